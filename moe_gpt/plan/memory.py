"""Memory of one GPU in training, under tensor, pipeline, expert and data parallelism and ZeRO.

State: ZeRO (arXiv 1910.02054, section 3.1 and figure 1), with mixed-precision Adam 2 bytes of weights, 2 of gradients
and 12 of optimizer for each parameter; this project's own float32 training has 4, 4 and 8. Activations: Korthikanti et
al. (arXiv 2205.05198, equations 1 to 5), adapted to SwiGLU experts, shared key-value heads, fused attention and no
dropout, with sequence parallelism, so that everything is split by the tensor size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.config.section import Count, require
from moe_gpt.measure.memory import predict_training_memory_cpu
from moe_gpt.measure.parameters import model_of
from moe_gpt.plan.hardware import DIVIDED, Gpu, Parallelism
from moe_gpt.plan.parameters import counts_of
from moe_gpt.plan.quantities import Member, PlanSection, plan_section
from moe_gpt.terminal.numbers import format_value


class StateBytes(NamedTuple):
    """Bytes of what training keeps from step to step; for each parameter, or of all on one GPU."""

    weights: float
    gradients: float
    optimizer: float


MIXED_PRECISION = StateBytes(2, 2, 12)
"""bf16 weights and gradients; float32 weights and both moments with the optimizer (ZeRO: K = 12)."""
FLOAT32 = StateBytes(4, 4, 8)
"""All in float32, weights once: how this project trains, whatever type the products have."""


class GpuMemory(NamedTuple):
    """Bytes on one GPU of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """What a layer needs whole for a moment: where ranks keep a part of the gradients, the gradient of the layer that
    computes, before it is reduced; where they keep a part of the weights, its weights and those of the next one."""
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class TrainingLayout:
    """How a step is laid out over the GPUs: what decides its memory and traffic, besides the model."""

    parallelism: Parallelism
    recompute: bool
    """Keep each layer's input only, and compute the rest of it again in the backward pass."""
    micro_batch_sequences: int
    """Sequences of one forward pass."""
    seq_len: int
    batch_tokens: int
    per_parameter: StateBytes = MIXED_PRECISION

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_sequences * self.seq_len

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank in a step, the last perhaps not full."""
        return max(1, math.ceil(self.batch_tokens / (self.parallelism.batch_ranks * self.tokens)))

    @property
    def element(self) -> int:
        """Bytes of a number of an activation: as many as of a weight."""
        return int(self.per_parameter.weights)

    def layers(self, model: ModelConfig) -> int:
        """Return the layers of a stage."""
        return model.n_layers // self.parallelism.pipeline


def zero_bytes(
    parameters: float, ranks: int, zero_level: int, per_parameter: StateBytes = MIXED_PRECISION
) -> StateBytes:
    """Return the bytes that one of ``ranks`` data-parallel ranks keeps of ``parameters`` (ZeRO, figure 1).

    Stage 1 splits the optimizer's state over the ranks, stage 2 gradients too, stage 3 weights too.
    """
    shares = (ranks if zero_level >= level else 1 for level in (3, 2, 1))
    return StateBytes(*(parameters * each / share for each, share in zip(per_parameter, shares, strict=True)))


class StageParameters(NamedTuple):
    """Parameters on one GPU of a pipeline stage."""

    shared: float
    experts: float
    outside: float
    """Of the shared ones: embedding, output and last norm, which belong to no layer."""
    largest_layer: float
    """Of both kinds, in one layer."""


def stage_parameters(model: ModelConfig, parallelism: Parallelism, stage: int) -> StageParameters:
    """Return the parameters that a GPU of a stage holds before ZeRO splits them.

    Tensor parallelism splits attention, experts and vocabulary; routers and norms are whole on every GPU, and so is a
    key-value head where there are fewer of them than GPUs. The first and the last stage have the embedding and the
    output matrix, tied ones a copy each.
    """
    counts = counts_of(model)
    layers, tensor = model.n_layers // parallelism.pipeline, parallelism.tensor
    query_and_out = 2 * model.d_model * model.n_heads * model.head_dim / tensor
    attention = query_and_out + 2 * model.d_model * model.head_dim * math.ceil(model.n_kv_heads / tensor)
    first, sharing = stage * layers, model.attention_sharing
    n_attentions = (first + layers - 1) // sharing - first // sharing + 1
    whole = counts.router / model.n_layers + 2 * model.d_model
    experts = model.n_experts * counts.per_expert / model.n_layers / (tensor * parallelism.expert)
    vocabulary = model.d_model * (model.vocab_size or 1) / tensor
    is_last = stage == parallelism.pipeline - 1
    n_matrices = (stage == 0) + is_last - (parallelism.pipeline == 1 and model.tie_embeddings)
    outside = n_matrices * vocabulary + is_last * model.d_model
    return StageParameters(
        shared=n_attentions * attention + layers * whole + outside,
        experts=layers * experts,
        outside=outside,
        largest_layer=attention + whole + experts,
    )


def layer_activation_bytes(model: ModelConfig, tokens: int, tensor: int = 1, element: int = 2) -> float:
    """Return what one layer keeps for its backward pass, on one of ``tensor`` GPUs.

    Bytes for each token, b for an element: inputs of both norms 2 D b; of the projections D b and H Dh b; queries
    H Dh b, keys and values 2 G Dh b; the softmax's normaliser 4 H (fused attention keeps no probabilities). An expert
    layer: the router's input in float32 4 D, its logits and probabilities 8 E; for each of K experts the row in and
    out 2 D b, gate and up 2 F b, their product F b. A dense one: its input D b, and 3 F b. The ``tensor`` GPUs split
    the layer and, outside of products, the sequence.
    """
    d_model, d_ff, inner = model.d_model, model.d_ff, model.n_heads * model.head_dim
    kv_width = model.head_dim * math.ceil(model.n_kv_heads / tensor) * tensor
    attention = element * (3 * d_model + 2 * inner + 2 * kv_width) + 4 * model.n_heads
    if model.is_dense:
        feed_forward = element * (d_model + 3 * d_ff)
    else:
        feed_forward = 4 * d_model + 8 * model.n_experts + element * model.top_k * (2 * d_model + 3 * d_ff)
    return tokens * (attention + feed_forward) / tensor


def gpu_memory(model: ModelConfig, layout: TrainingLayout, stage: int) -> GpuMemory:
    """Return the memory of one GPU of a pipeline stage.

    In one-forward-one-backward order stage s of p has min(p - s, micro-batches) of them in flight. ZeRO splits what is
    not an expert over all ranks that read different text, and each expert over its copies.
    """
    spread, element, tokens = layout.parallelism, layout.element, layout.tokens
    held = stage_parameters(model, spread, stage)
    shared = zero_bytes(held.shared, spread.batch_ranks, spread.zero_level, layout.per_parameter)
    experts = zero_bytes(held.experts, spread.data_parallel, spread.zero_level, layout.per_parameter)
    gathered = 2 * element * (spread.zero_level >= 3) + layout.per_parameter.gradients * (spread.zero_level >= 2)
    layer = layer_activation_bytes(model, tokens, spread.tensor, element)
    layer_input = element * tokens * model.d_model / spread.tensor
    layers_in_flight = layout.layers(model) * min(spread.pipeline - stage, layout.micro_batches)
    is_last = stage == spread.pipeline - 1
    return GpuMemory(
        weights=shared.weights + experts.weights,
        gradients=shared.gradients + experts.gradients,
        optimizer=shared.optimizer + experts.optimizer,
        gathered=held.largest_layer * gathered,
        activations=layers_in_flight * layer_input + layer if layout.recompute else layers_in_flight * layer,
        logits=is_last * (4 * tokens * (model.vocab_size or 1) / spread.tensor + 2 * layer_input),
    )


def worst_stage(model: ModelConfig, layout: TrainingLayout) -> tuple[int, GpuMemory]:
    """Return the pipeline stage whose GPUs need the most memory, and what they need."""
    stages = ((stage, gpu_memory(model, layout, stage)) for stage in range(layout.parallelism.pipeline))
    return max(stages, key=lambda found: found[1].total)


def memory_section(
    config: RunConfig, parallelism: Parallelism, gpu: Gpu, recompute: bool, micro_batch_sequences: int = 1
) -> PlanSection:
    """Say what a GPU of the worst pipeline stage must hold, whether it does, and if not, what to change first.

    The schedule's longest sequences and its largest batch count. One ``cpu`` is this project's own training on it, by
    ``predict_training_memory_cpu``.
    """
    model = model_of(config)
    require(Count, micro_batch_sequences=micro_batch_sequences)
    parallelism.check(model)
    if gpu.name == "cpu" and parallelism.n_gpus == 1:
        return _section_for_cpu(config, gpu)
    is_float32 = config.train.precision == "fp32" or gpu.name == "cpu"
    layout = TrainingLayout(
        parallelism,
        recompute,
        micro_batch_sequences,
        seq_len=max(stage.seq_len for stage in config.schedule.stages),
        batch_tokens=max(max(stage.batch_range) for stage in config.schedule.stages),
        per_parameter=FLOAT32 if is_float32 else MIXED_PRECISION,
    )
    return _section_for_gpus(model, layout, gpu)


def _section_for_gpus(model: ModelConfig, layout: TrainingLayout, gpu: Gpu) -> PlanSection:
    spread, each = layout.parallelism, layout.per_parameter
    stage, memory = worst_stage(model, layout)
    parts = memory._asdict()
    a_layer = layer_activation_bytes(model, layout.tokens, spread.tensor, layout.element)
    last = {name: parts.pop(name) for name in ("activations", "logits")}
    fits = memory.total <= gpu.memory_bytes
    section = plan_section(
        "memory",
        {
            "weights_average": counts_of(model).total * each.weights / spread.model_gpus,
            **parts,
            "activations_per_layer": a_layer,
            **last,
            "total": memory.total,
            **_by_stage(model, layout),
            **{"available": gpu.memory_bytes, "fits": fits},
        },
        {"experts": spread.expert > 1},
        gpu=gpu,
        layout=layout,
        own="" if each is MIXED_PRECISION else "; this project's own training is float32",
        feed_forward="b (D + 3 F)" if model.is_dense else "4 D + 8 E + b K (2 D + 3 F)",
        kept="their inputs and one whole layer" if layout.recompute else "whole",
        stage=stage,
        with_or_without="With" if layout.recompute else "Without",
        in_flight=min(spread.pipeline - stage, layout.micro_batches),
    )
    return section if fits else dataclasses.replace(section, notes=[*section.notes, *advise(model, layout, gpu)])


def _by_stage(model: ModelConfig, layout: TrainingLayout) -> dict[str, Member]:
    """Return the memory of the first, a middle and the last stage of a pipeline."""
    last = layout.parallelism.pipeline - 1
    chosen = {"first": 0, "middle": last // 2, "last": last}
    return {
        f"{name}_stage": Member(gpu_memory(model, layout, stage).total, {"which": name, "number": stage})
        for name, stage in chosen.items()
        if last and (name != "middle" or 0 < stage < last)
    }


def _section_for_cpu(config: RunConfig, gpu: Gpu) -> PlanSection:
    counts = counts_of(model_of(config))
    total, available = predict_training_memory_cpu(config, counts), gpu.memory_bytes
    state = {name: counts.total * each for name, each in FLOAT32._asdict().items()}
    values = {**state, "activations": max(0, total - sum(state.values())), "total": total, "available": available}
    fits = total <= available
    return plan_section("memory_on_cpu", {**values, "fits": fits}, {"advice": not fits}, gpu=gpu, each=FLOAT32)


def advise(model: ModelConfig, layout: TrainingLayout, gpu: Gpu) -> list[str]:
    """Return what to change, first things first, until it fits; each line has what is then needed.

    Of each kind it is the least change that fits, or else the one that helps most; none that saves under a hundredth.
    """
    lines: list[str] = []
    needed = worst_stage(model, layout)[1].total
    for kind in ("recompute", "micro_batch_sequences", "zero", "pipeline", "tensor", "expert"):
        tried = [(worst_stage(model, to)[1].total, text, to) for text, to in _changes(kind, model, layout, gpu)]
        helpful = [change for change in tried if change[0] < 0.99 * needed]
        if not helpful:
            continue
        # the key is the same for all that fit, and min takes the first of equals
        needed, text, layout = min(helpful, key=lambda change: max(change[0], gpu.memory_bytes))
        fits = needed <= gpu.memory_bytes
        lines.append(f"{'then' if lines else 'Change first'}: {text}; it then needs {format_value(needed, 'bytes')}"
                     f"{', which fits' if fits else ''}.")  # fmt: skip
        if fits:
            return lines
    return [*lines, "That is not enough: it takes more GPUs, larger ones, or a smaller model."]


def _changes(kind: str, model: ModelConfig, layout: TrainingLayout, gpu: Gpu) -> Iterator[tuple[str, TrainingLayout]]:
    """Yield what may be changed of one kind with the same GPUs, the least change first."""
    if kind == "recompute":
        yield "recompute activations", dataclasses.replace(layout, recompute=True)
    elif kind == "micro_batch_sequences":
        yield "micro-batches of one sequence", dataclasses.replace(layout, micro_batch_sequences=1)
    else:
        now = layout.parallelism
        for value in _larger(kind, model, now, gpu):
            spread = dataclasses.replace(now, **{kind: value})  # type: ignore[arg-type]
            yield f"{kind}={value}", dataclasses.replace(layout, parallelism=spread)


def _larger(axis: str, model: ModelConfig, now: Parallelism, gpu: Gpu) -> Sequence[int | str]:
    """Return the values of an axis above the present one that the same GPUs allow."""
    if axis == "zero":
        return (1, 2, "fsdp")[now.zero_level :]
    size, divided = getattr(now, axis), getattr(model, DIVIDED[axis])
    limit = min(divided, gpu.per_node if axis == "tensor" else divided, now.n_gpus * size // now.model_gpus)
    return [larger for larger in range(size + 1, limit + 1) if divided % larger == 0]
