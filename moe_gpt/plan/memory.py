"""Memory of one GPU in training, under tensor, pipeline, expert and data parallelism and ZeRO.

State: ZeRO (arXiv 1910.02054, section 3.1 and figure 1), with mixed-precision Adam 2 bytes of weights, 2 of gradients
and 12 of optimizer for each parameter; this project's own float32 training has 4, 4 and 8. Activations: Korthikanti et
al. (arXiv 2205.05198, equations 1 to 5), adapted to SwiGLU experts, shared key-value heads, fused attention and no
dropout, with sequence parallelism, so that everything is split by the tensor size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.measure.memory import predict_training_memory_cpu
from moe_gpt.measure.parameters import ParameterCounts, count_parameters, model_of
from moe_gpt.plan.hardware import Gpu, Parallelism, ZeroStage, check_positive
from moe_gpt.plan.quantities import PlanSection, Quantity
from moe_gpt.terminal.numbers import format_value

_ZERO = "ZeRO, arXiv 1910.02054, section 3.1 and figure 1"
_KORTHIKANTI = "Korthikanti et al., arXiv 2205.05198, equations 1 to 5, adapted (see moe_gpt.plan.memory)"


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
class Setting:
    """What decides the memory of a step besides the model."""

    layout: Parallelism
    recompute: bool
    micro_batch_sequences: int
    seq_len: int
    batch_tokens: int
    per_parameter: StateBytes

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank in a step, the last perhaps not full."""
        ranks_tokens = self.layout.batch_ranks * self.micro_batch_sequences * self.seq_len
        return max(1, math.ceil(self.batch_tokens / ranks_tokens))


def zero_bytes(
    parameters: float, ranks: int, zero: ZeroStage, per_parameter: StateBytes = MIXED_PRECISION
) -> StateBytes:
    """Return the bytes that one of ``ranks`` data-parallel ranks keeps of ``parameters`` (ZeRO, figure 1).

    Stage 1 splits the optimizer's state over the ranks, stage 2 gradients too, stage 3 and FSDP weights too.
    """
    level = 3 if zero == "fsdp" else zero
    weights, gradients, optimizer = per_parameter
    return StateBytes(
        parameters * weights / (ranks if level >= 3 else 1),
        parameters * gradients / (ranks if level >= 2 else 1),
        parameters * optimizer / (ranks if level >= 1 else 1),
    )


class StageParameters(NamedTuple):
    """Parameters on one GPU of a pipeline stage."""

    shared: float
    experts: float
    largest_layer: float
    """Of both kinds, in one layer."""


def stage_parameters(
    model: ModelConfig, layout: Parallelism, stage: int, counts: ParameterCounts | None = None
) -> StageParameters:
    """Return the parameters that a GPU of a stage holds before ZeRO splits them.

    Tensor parallelism splits attention, experts and vocabulary; routers and norms are whole on every GPU, and so is a
    key-value head where there are fewer of them than GPUs. The first and the last stage have the embedding and the
    output matrix, tied ones a copy each.
    """
    counts = counts or count_parameters(model)
    layers, tensor = model.n_layers // layout.pipeline, layout.tensor
    query_and_out = 2 * model.d_model * model.n_heads * model.head_dim / tensor
    attention = query_and_out + 2 * model.d_model * model.head_dim * math.ceil(model.n_kv_heads / tensor)
    first, sharing = stage * layers, model.attention_sharing
    n_attentions = (first + layers - 1) // sharing - first // sharing + 1
    whole = counts.router / model.n_layers + 2 * model.d_model
    experts = model.n_experts * counts.per_expert / model.n_layers / (tensor * layout.expert)
    vocabulary = model.d_model * (model.vocab_size or 1) / tensor
    is_last = stage == layout.pipeline - 1
    n_matrices = (stage == 0) + is_last - (layout.pipeline == 1 and model.tie_embeddings)
    return StageParameters(
        shared=n_attentions * attention + layers * whole + n_matrices * vocabulary + is_last * model.d_model,
        experts=layers * experts,
        largest_layer=attention + whole + experts,
    )


def layer_activation_bytes(model: ModelConfig, tokens: int, tensor: int = 1, element: int = 2) -> float:
    """Return what one layer keeps for its backward pass, on one of ``tensor`` GPUs.

    Bytes for each token, b for an element: inputs of both norms 2 D b; of the projections D b and H Dh b; queries
    H Dh b, keys and values 2 G Dh b; the softmax's normaliser 4 H (fused attention keeps no probabilities). An expert
    layer: the router's input in float32 4 D, its logits and probabilities 8 E; for each of K experts the row in and
    out 2 D b, gate and up 2 F b, their product F b. A dense one: its input D b, and 3 F b.

    Args:
        model: the shape.
        tokens: of a micro-batch.
        tensor: GPUs that split the layer and, outside of products, the sequence.
        element: bytes of a number.
    """
    d_model, d_ff, inner = model.d_model, model.d_ff, model.n_heads * model.head_dim
    kv_width = model.head_dim * math.ceil(model.n_kv_heads / tensor) * tensor
    attention = element * (3 * d_model + 2 * inner + 2 * kv_width) + 4 * model.n_heads
    if model.is_dense:
        feed_forward = element * (d_model + 3 * d_ff)
    else:
        feed_forward = 4 * d_model + 8 * model.n_experts + element * model.top_k * (2 * d_model + 3 * d_ff)
    return tokens * (attention + feed_forward) / tensor


def gpu_memory(model: ModelConfig, setting: Setting, stage: int, counts: ParameterCounts) -> GpuMemory:
    """Return the memory of one GPU of a pipeline stage.

    In one-forward-one-backward order stage s of p has min(p - s, micro-batches) of them in flight. ZeRO splits what is
    not an expert over all ranks that read different text, and each expert over its copies.
    """
    layout, element, gradient = setting.layout, int(setting.per_parameter.weights), setting.per_parameter.gradients
    held = stage_parameters(model, layout, stage, counts)
    shared = zero_bytes(held.shared, layout.batch_ranks, layout.zero, setting.per_parameter)
    experts = zero_bytes(held.experts, layout.data_parallel, layout.zero, setting.per_parameter)
    tokens = setting.micro_batch_sequences * setting.seq_len
    layer = layer_activation_bytes(model, tokens, layout.tensor, element)
    layer_input = element * tokens * model.d_model / layout.tensor
    layers_in_flight = model.n_layers // layout.pipeline * min(layout.pipeline - stage, setting.micro_batches)
    is_last = stage == layout.pipeline - 1
    return GpuMemory(
        weights=shared.weights + experts.weights,
        gradients=shared.gradients + experts.gradients,
        optimizer=shared.optimizer + experts.optimizer,
        gathered=held.largest_layer * (2 * element * layout.shards_weights + gradient * layout.shards_gradients),
        activations=layers_in_flight * layer_input + layer if setting.recompute else layers_in_flight * layer,
        logits=is_last * (4 * tokens * (model.vocab_size or 1) / layout.tensor + 2 * layer_input),
    )


def worst_stage(model: ModelConfig, setting: Setting, counts: ParameterCounts) -> tuple[int, GpuMemory]:
    """Return the pipeline stage whose GPUs need the most memory, and what they need."""
    stages = ((stage, gpu_memory(model, setting, stage, counts)) for stage in range(setting.layout.pipeline))
    return max(stages, key=lambda found: found[1].total)


def memory_section(
    config: RunConfig,
    layout: Parallelism,
    gpu: Gpu,
    recompute: bool,
    micro_batch_sequences: int = 1,
    counts: ParameterCounts | None = None,
) -> PlanSection:
    """Say what a GPU of the worst pipeline stage must hold, whether it does, and if not, what to change first.

    Args:
        config: model and schedule, whose longest sequences and largest batch count.
        layout: over the GPUs.
        gpu: each of them; one ``cpu`` is this project's own training on it, by ``predict_training_memory_cpu``.
        recompute: keep each layer's input only, and compute the rest of it again in the backward pass.
        micro_batch_sequences: of one forward pass.
        counts: of the model, where they are known already.
    """
    model = model_of(config)
    layout.check(model)
    counts = counts or count_parameters(model)
    if gpu.name == "cpu" and layout.n_gpus == 1:
        return _section_for_cpu(config, gpu, counts)
    setting = Setting(
        layout,
        recompute,
        round(check_positive("micro_batch_sequences", micro_batch_sequences)),
        seq_len=max(stage.seq_len for stage in config.schedule.stages),
        batch_tokens=max(max(stage.batch_range) for stage in config.schedule.stages),
        per_parameter=FLOAT32 if config.train.precision == "fp32" or gpu.name == "cpu" else MIXED_PRECISION,
    )
    stage, memory = worst_stage(model, setting, counts)
    fits = memory.total <= gpu.memory_bytes
    notes = [
        f"The worst of {layout.pipeline} stages is stage {stage}, the first being 0. "
        f"{'With' if recompute else 'Without'} recomputation; {min(layout.pipeline - stage, setting.micro_batches)} of "
        f"{setting.micro_batches} micro-batches in flight (1F1B).",
        "Experts are assumed to get equally many tokens. Buffers of communication, libraries and holes between tensors "
        "come on top: leave some 10 % free.",
    ]
    if layout.expert > 1:
        notes.append(
            f"ZeRO splits an expert over its {layout.data_parallel:,} copies, the rest over {layout.batch_ranks:,}."
        )
    if not fits:
        notes += advise(model, setting, gpu, counts)
    return PlanSection(
        "memory",
        f"Memory of one {gpu.name} in training",
        [*_state(memory, setting, counts), *_activations(model, memory, setting), *_verdict(memory.total, gpu)],
        notes,
    )


def _state(memory: GpuMemory, setting: Setting, counts: ParameterCounts) -> Iterator[Quantity]:
    layout, each = setting.layout, setting.per_parameter
    yield Quantity(
        "weights_average", counts.total * each.weights / layout.model_gpus, "bytes",
        "Weights, average GPU before ZeRO", f"{each.weights:g} total / (tensor pipeline expert)", "counted",
    )  # fmt: skip
    for name, label, first in (("weights", "Weights", 3), ("gradients", "Gradients", 2), ("optimizer", "Optimizer", 1)):
        yield Quantity(
            name, getattr(memory, name), "bytes", label,
            f"{getattr(each, name):g} x parameters of the stage on this GPU, over the ranks from ZeRO stage {first} on "
            f"(here: {layout.zero})",
            _ZERO if each is MIXED_PRECISION else f"{_ZERO}; this project's own training is float32",
        )  # fmt: skip
    yield Quantity(
        "gathered", memory.gathered, "bytes", "Whole weights and gradients of a layer, for a moment",
        "from ZeRO stage 2 on a layer's gradient, in stage 3 and FSDP two layers' weights, too",
        "assumption: one layer is fetched ahead",
    )  # fmt: skip


def _activations(model: ModelConfig, memory: GpuMemory, setting: Setting) -> Iterator[Quantity]:
    tokens = setting.micro_batch_sequences * setting.seq_len
    element = int(setting.per_parameter.weights)
    layer = layer_activation_bytes(model, tokens, setting.layout.tensor, element)
    feed_forward = "b (D + 3 F)" if model.is_dense else "4 D + 8 E + b K (2 D + 3 F)"
    yield Quantity(
        "activations_per_layer", layer, "bytes", f"Activations of a layer and {tokens:,} tokens",
        f"tokens / tensor x (b (3 D + 2 H Dh + 2 G Dh) + 4 H + {feed_forward}), b = {element}", _KORTHIKANTI,
    )  # fmt: skip
    kept = "their inputs and one whole layer" if setting.recompute else "whole"
    yield Quantity("activations", memory.activations, "bytes", f"Activations, all in flight ({kept})",
                   "layers of the stage x micro-batches in flight x a layer", _KORTHIKANTI)  # fmt: skip
    yield Quantity("logits", memory.logits, "bytes", "Logits in float32, last stage",
                   "tokens / tensor x (4 V + 2 b D)", "Korthikanti et al., arXiv 2205.05198, section 4.3")  # fmt: skip


def _verdict(total: float, gpu: Gpu) -> Iterator[Quantity]:
    yield Quantity("total", total, "bytes", "Total", "sum of the above but the averages and single layers", "computed")
    yield Quantity("available", gpu.memory_bytes, "bytes", f"Memory of {gpu.name}", "given", gpu.source)
    yield Quantity("fits", total <= gpu.memory_bytes, "text", "Fits", "total <= available", "computed")


def _section_for_cpu(config: RunConfig, gpu: Gpu, counts: ParameterCounts) -> PlanSection:
    total = predict_training_memory_cpu(config, counts)
    state = StateBytes(*(counts.total * each for each in FLOAT32))
    source = "this project's own float32 training step; see moe_gpt.measure.memory"
    values = [
        *(
            Quantity(name, getattr(state, name), "bytes", name.capitalize(), f"{each:g} x parameters", source)
            for name, each in FLOAT32._asdict().items()
        ),
        Quantity("activations", max(0, total - sum(state)), "bytes", "Activations and buffers beyond that",
                 "total - weights - gradients - optimizer", source),
    ]  # fmt: skip
    advice = "Change first: train.activation_checkpointing=true, then a smaller train.micro_batch_tokens."
    return PlanSection(
        "memory",
        "Memory of training on this CPU",
        [*values, *_verdict(total, gpu)],
        ["float32, beyond what Python and torch take when imported."] + ([] if total <= gpu.memory_bytes else [advice]),
    )


def advise(model: ModelConfig, setting: Setting, gpu: Gpu, counts: ParameterCounts) -> list[str]:
    """Return what to change, first things first, until it fits; each line has what is then needed."""
    lines: list[str] = []
    needed = worst_stage(model, setting, counts)[1].total
    for kind in _KINDS_OF_CHANGES:
        best: tuple[float, str, Setting] | None = None
        for text, changed in _changes(kind, model, setting, gpu):
            total = worst_stage(model, changed, counts)[1].total
            if total < 0.99 * needed and (best is None or total < best[0]):
                best = (total, text, changed)
                if total <= gpu.memory_bytes:
                    break
        if best is None:
            continue
        needed, text, setting = best
        fits = needed <= gpu.memory_bytes
        lines.append(f"{'Change first' if not lines else 'then'}: {text}, to {format_value(needed, 'bytes')}"
                     f"{', which fits' if fits else ''}.")  # fmt: skip
        if fits:
            return lines
    return [*lines, "That is not enough: it takes more GPUs, larger ones, or a smaller model."]


_KINDS_OF_CHANGES = ("recompute", "micro_batch_sequences", "zero", "pipeline", "tensor", "expert")


def _changes(kind: str, model: ModelConfig, setting: Setting, gpu: Gpu) -> Iterator[tuple[str, Setting]]:
    """Yield what may be changed of one kind with the same GPUs, the least change first."""
    layout = setting.layout
    if kind == "recompute":
        if not setting.recompute:
            yield "recompute activations", dataclasses.replace(setting, recompute=True)
    elif kind == "micro_batch_sequences":
        if setting.micro_batch_sequences > 1:
            yield "micro-batches of one sequence", dataclasses.replace(setting, micro_batch_sequences=1)
    elif kind == "zero":
        stages: tuple[ZeroStage, ...] = (0, 1, 2, "fsdp")
        for zero in () if layout.shards_weights else stages[stages.index(layout.zero) + 1 :]:
            yield f"zero={zero}", dataclasses.replace(setting, layout=dataclasses.replace(layout, zero=zero))
    else:
        divided = {"pipeline": model.n_layers, "tensor": model.n_heads, "expert": model.n_experts}[kind]
        limit = gpu.per_node if kind == "tensor" else divided
        now = getattr(layout, kind)
        for size in range(now + 1, min(limit, divided, layout.n_gpus * now // layout.model_gpus) + 1):
            if divided % size == 0:
                changed = dataclasses.replace(layout, **{kind: size})  # type: ignore[arg-type]
                yield f"{kind}={size}", dataclasses.replace(setting, layout=changed)
