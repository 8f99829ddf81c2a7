"""What the GPUs of a layout send each other in an optimizer step, and the pipeline's idle share.

Volumes are bytes that one GPU of a middle stage sends, numbers in bf16, collectives as rings: an all-reduce of V bytes
over n ranks sends 2 (n - 1) / n V, a reduce-scatter, all-gather or all-to-all (n - 1) / n V. Times are those bytes at
the peak speed of the slowest link they cross, one kind after another, none hidden behind computing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.measure.flops import count_flops
from moe_gpt.measure.parameters import ParameterCounts, count_parameters, model_of
from moe_gpt.plan.hardware import Gpu, Parallelism, check_positive
from moe_gpt.plan.memory import StageParameters, stage_parameters
from moe_gpt.plan.quantities import PlanSection, Quantity

_ELEMENT = 2
_NARAYANAN = "Narayanan et al., arXiv 2104.04473"


class Traffic(NamedTuple):
    """One kind of communication in a step."""

    name: str
    label: str
    n_bytes: float
    speed: float
    """Of the slowest link on its way, bytes/s."""
    formula: str
    source: str


def communication_section(
    config: RunConfig,
    layout: Parallelism,
    gpu: Gpu,
    recompute: bool = False,
    micro_batch_sequences: int = 1,
    counts: ParameterCounts | None = None,
) -> PlanSection:
    """Say what a step of the last stage's largest batch sends, by kind, and how long the pipeline idles.

    Args:
        config: model and schedule.
        layout: over the GPUs, tensor ranks next to each other, then expert, data-parallel and pipeline ranks.
        gpu: its links count.
        recompute: forward passes within layers, and what they send, happen twice.
        micro_batch_sequences: of one forward pass.
        counts: of the model, where they are known already.
    """
    model = model_of(config)
    layout.check(model)
    counts = counts or count_parameters(model)
    stage = config.schedule.stages[-1]
    tokens = round(check_positive("micro_batch_sequences", micro_batch_sequences)) * stage.seq_len
    batch = max(stage.batch_range)
    micro_batches = max(1, math.ceil(batch / (tokens * layout.batch_ranks)))
    traffic = list(_traffic(model, layout, gpu, tokens, micro_batches, recompute, counts))
    at_peak = batch * count_flops(model, stage.seq_len, counts).training / (layout.used * gpu.bf16_flops)
    seconds = sum(kind.n_bytes / kind.speed for kind in traffic)
    return PlanSection(
        "communication",
        f"Communication of one {gpu.name} in a step of {batch:,} tokens",
        [
            Quantity("micro_batches", micro_batches, "count", "Micro-batches of a rank",
                     "batch_tokens / (micro-batch tokens x data-parallel ranks), rounded up", "schedule"),
            Quantity("pipeline_bubble", bubble(layout.pipeline, micro_batches), "fraction",
                     "Pipeline bubble, share of the step", "(p - 1) / (m + p - 1), p stages and m micro-batches",
                     f"{_NARAYANAN}, section 2.2, which divides by m instead"),
            *(Quantity(f"{kind.name}_bytes", kind.n_bytes, "bytes", kind.label, kind.formula, kind.source)
              for kind in traffic),
            *(Quantity(f"{kind.name}_seconds", kind.n_bytes / kind.speed, "seconds", f"Time: {kind.label}",
                       f"bytes at {kind.speed:.3g} bytes/s", gpu.source) for kind in traffic),
            Quantity("total_bytes", sum(kind.n_bytes for kind in traffic), "bytes", "All kinds", "sum", "computed"),
            Quantity("total_seconds", seconds, "seconds", "Time of all kinds", "sum", "computed"),
            Quantity("compute_seconds_at_peak", at_peak, "seconds", "Time of the step's products at peak speed",
                     "batch_tokens training FLOPs per token / (working GPUs gpu_flops)", gpu.source),
        ],
        _notes(batch, tokens, micro_batches, layout),
    )  # fmt: skip


def bubble(pipeline: int, micro_batches: int) -> float:
    """Return the share of a step that each stage idles, (p - 1) / (m + p - 1)."""
    return (pipeline - 1) / (micro_batches + pipeline - 1)


def _notes(batch: int, tokens: int, micro_batches: int, layout: Parallelism) -> list[str]:
    notes = ["Rings in bf16 at the links' peak, one after another; in practice part of it hides behind computing."]
    if batch < tokens * layout.batch_ranks:
        busy = math.ceil(batch / tokens)
        notes.append(f"The batch has {busy:,} micro-batches for {layout.batch_ranks:,} ranks: the others idle.")
    elif batch % (tokens * layout.batch_ranks):
        notes.append(
            f"{batch / tokens:,.6g} micro-batches do not divide by {layout.batch_ranks:,} ranks: some do "
            f"{micro_batches}, others one less, and wait."
        )
    return notes


def _traffic(
    model: ModelConfig,
    layout: Parallelism,
    gpu: Gpu,
    tokens: int,
    micro_batches: int,
    recompute: bool,
    counts: ParameterCounts,
) -> Iterator[Traffic]:
    layers = model.n_layers // layout.pipeline
    hidden = _ELEMENT * tokens * model.d_model  # bytes of a micro-batch's residual stream
    passes = 1.5 if recompute else 1  # two of four happen in the forward pass
    t, e = layout.tensor, layout.expert
    again = " (x 1.5: forward twice)" if recompute else ""
    yield Traffic(
        "tensor_all_reduce", "Tensor-parallel all-reduces",
        4 * passes * layers * micro_batches * hidden * 2 * (t - 1) / t, _link(gpu, t),
        f"4 x layers of the stage x m x 2 b s D x 2 (t - 1) / t{again}", f"{_NARAYANAN}, section 3.2",
    )  # fmt: skip
    yield Traffic(
        "expert_all_to_all", "Expert all-to-alls",
        4 * passes * layers * micro_batches * model.top_k * hidden / t * (e - 1) / e, _link(gpu, t * e),
        f"4 x layers of the stage x m x 2 K b s D / t x (e - 1) / e{again}", "GShard, arXiv 2006.16668, section 3.2",
    )  # fmt: skip
    yield Traffic(
        "pipeline_sends", "Pipeline sends, forward and backward",
        2 * micro_batches * hidden / t * (layout.pipeline > 1), _link(gpu, layout.used),
        "2 m x 2 b s D / t: each of t GPUs sends its part", f"{_NARAYANAN}, section 4.1 (scatter/gather)",
    )  # fmt: skip
    yield from _data_parallel(layout, gpu, micro_batches, stage_parameters(model, layout, layout.pipeline // 2, counts))


def _data_parallel(layout: Parallelism, gpu: Gpu, micro_batches: int, held: StageParameters) -> Iterator[Traffic]:
    """Yield the exchange of gradients and weights (ZeRO, arXiv 1910.02054, section 7)."""
    # bytes over a ring of all ranks, of one pass over gradients or weights
    once = sum(
        _ELEMENT * parameters * (ranks - 1) / ranks
        for parameters, ranks in ((held.shared, layout.batch_ranks), (held.experts, layout.data_parallel))
    )
    level = 3 if layout.shards_weights else int(layout.zero)
    speed = _link(gpu, layout.tensor * layout.batch_ranks)
    source = "ZeRO, arXiv 1910.02054, section 7"
    scatters, gathers = (micro_batches if level >= 2 else 1), (2 * micro_batches if level >= 3 else 1)
    if level == 0:
        yield Traffic("gradient_all_reduce", "Gradient all-reduce", 2 * once, speed,
                      "2 x 2 parameters of the GPU x (n - 1) / n", source)  # fmt: skip
        return
    yield Traffic(
        "gradient_reduce_scatter", "Gradient reduce-scatter", scatters * once, speed,
        f"2 parameters of the GPU x (n - 1) / n, {'each micro-batch' if level >= 2 else 'once'}", source,
    )  # fmt: skip
    yield Traffic(
        "weight_all_gather", "Weight all-gather", gathers * once, speed,
        "2 parameters of the GPU x (n - 1) / n, "
        + ("forward and backward of each micro-batch" if level >= 3 else "once, after the optimizer"), source,
    )  # fmt: skip


def _link(gpu: Gpu, n_neighbours: int) -> float:
    """Return the speed among that many GPUs that stand next to each other."""
    return gpu.link if n_neighbours <= gpu.per_node else min(gpu.link, gpu.network)
