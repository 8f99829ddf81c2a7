"""What the GPUs of a layout send each other in an optimizer step, and the pipeline's idle share.

Volumes are bytes that one GPU of a middle stage sends, numbers in bf16, collectives as rings: an all-reduce of V bytes
over n ranks sends 2 (n - 1) / n V, a reduce-scatter, all-gather or all-to-all (n - 1) / n V. Times are those bytes at
the peak speed of the slowest link they cross, one kind after another, none hidden behind computing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.measure.flops import count_flops
from moe_gpt.measure.parameters import model_of
from moe_gpt.plan.hardware import Gpu, Parallelism
from moe_gpt.plan.memory import TrainingLayout, stage_parameters
from moe_gpt.plan.parameters import counts_of
from moe_gpt.plan.quantities import Member, PlanSection, plan_section

_ELEMENT = 2


class Traffic(NamedTuple):
    """One kind of communication in a step."""

    n_bytes: float
    speed: float
    """Of the slowest link on its way, bytes/s."""

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.n_bytes / self.speed


def communication_section(
    config: RunConfig, parallelism: Parallelism, gpu: Gpu, recompute: bool = False, micro_batch_sequences: int = 1
) -> PlanSection:
    """Say what a step of the last stage's largest batch sends, by kind, and how long the pipeline idles.

    Tensor ranks stand next to each other, then expert, data-parallel and pipeline ranks. With ``recompute`` forward
    passes within layers, and what they send, happen twice.
    """
    model, stage = model_of(config), config.schedule.stages[-1]
    parallelism.check(model)
    batch = max(stage.batch_range)
    layout = TrainingLayout(parallelism, recompute, micro_batch_sequences, stage.seq_len, batch)
    traffic = {**_model_parallel(model, layout, gpu), **_data_parallel(model, layout, gpu)}
    flops = count_flops(model, stage.seq_len, counts_of(model)).training
    micro_batches, available = layout.micro_batches, batch / layout.tokens
    values = {
        "micro_batches": micro_batches,
        "pipeline_bubble": bubble(parallelism.pipeline, micro_batches),
        **{f"{kind}_bytes": sent.n_bytes for kind, sent in traffic.items()},
        **{f"{kind}_seconds": Member(sent.seconds, {"speed": sent.speed}) for kind, sent in traffic.items()},
        "total_bytes": sum(sent.n_bytes for sent in traffic.values()),
        "total_seconds": sum(sent.seconds for sent in traffic.values()),
        "compute_seconds_at_peak": batch * flops / (parallelism.used * gpu.bf16_flops),
    }
    is_idle = available < parallelism.batch_ranks
    return plan_section(
        "communication",
        values,
        {"idle": is_idle, "uneven": not is_idle and available % parallelism.batch_ranks != 0},
        gpu=gpu,
        batch=batch,
        layout=parallelism,
        busy=math.ceil(available),
        available=available,
        micro_batches=micro_batches,
        again=" (x 1.5: forward twice)" if recompute else "",
        scatters="each micro-batch" if parallelism.zero_level >= 2 else "once",
        gathers=(
            "forward and backward of each micro-batch, embedding, output and last norm only forward"
            if parallelism.zero_level >= 3
            else "once, after the optimizer"
        ),
    )


def bubble(pipeline: int, micro_batches: int) -> float:
    """Return the share of a step that each stage idles, (p - 1) / (m + p - 1)."""
    return (pipeline - 1) / (micro_batches + pipeline - 1)


def _model_parallel(model: ModelConfig, layout: TrainingLayout, gpu: Gpu) -> dict[str, Traffic]:
    """Return what the GPUs of one copy of the model send each other."""
    spread = layout.parallelism
    t, e = spread.tensor, spread.expert
    hidden = layout.micro_batches * _ELEMENT * layout.tokens * model.d_model  # bytes of the residual stream
    exchanges = 4 * layout.layers(model) * (1.5 if layout.recompute else 1)  # two of four happen in the forward pass
    of_vocabulary = 2 * (spread.pipeline == 1)  # a middle stage has none
    return {
        "tensor_all_reduce": Traffic((exchanges + of_vocabulary) * hidden * 2 * (t - 1) / t, _link(gpu, t)),
        "expert_all_to_all": Traffic(exchanges * model.top_k * hidden / t * (e - 1) / e, _link(gpu, t * e)),
        "pipeline_sends": Traffic(2 * hidden / t * (spread.pipeline > 1), _link(gpu, spread.used)),
    }


def _data_parallel(model: ModelConfig, layout: TrainingLayout, gpu: Gpu) -> dict[str, Traffic]:
    """Return the exchange of gradients and weights (ZeRO, arXiv 1910.02054, section 7).

    ZeRO 3 gathers a layer for each forward and each backward pass, but keeps what belongs to no layer in between.
    """
    spread, level = layout.parallelism, layout.parallelism.zero_level
    held = stage_parameters(model, spread, spread.pipeline // 2)
    # bytes over a ring of all ranks, of one pass over gradients or weights
    once = sum(
        _ELEMENT * parameters * (ranks - 1) / ranks
        for parameters, ranks in ((held.shared, spread.batch_ranks), (held.experts, spread.data_parallel))
    )
    speed = _link(gpu, spread.tensor * spread.batch_ranks)
    if level == 0:
        return {"gradient_all_reduce": Traffic(2 * once, speed)}
    m = layout.micro_batches
    kept = _ELEMENT * held.outside * (spread.batch_ranks - 1) / spread.batch_ranks
    return {
        "gradient_reduce_scatter": Traffic(once * (m if level >= 2 else 1), speed),
        "weight_all_gather": Traffic(m * (2 * once - kept) if level >= 3 else once, speed),
    }


def _link(gpu: Gpu, n_neighbours: int) -> float:
    """Return the speed among that many GPUs that stand next to each other."""
    return gpu.link if n_neighbours <= gpu.per_node else min(gpu.link, gpu.network)
