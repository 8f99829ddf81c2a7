"""The plan of a run: every section for a config, hardware and prices, and how people read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from moe_gpt.config import RunConfig
from moe_gpt.measure.flops import stage_tokens
from moe_gpt.measure.parameters import count_parameters, model_of
from moe_gpt.plan.communication import communication_section
from moe_gpt.plan.hardware import Gpu, Parallelism
from moe_gpt.plan.inference_plan import inference_sections
from moe_gpt.plan.memory import memory_section
from moe_gpt.plan.parameters import parameters_section
from moe_gpt.plan.quantities import PlanSection, Quantity
from moe_gpt.plan.scaling_laws import optimal_section, predict_section
from moe_gpt.plan.training_cost import (
    Failures,
    compute_section,
    failures_section,
    mfu_from_duration,
    tokens_from_budget,
)
from moe_gpt.terminal.tables import format_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan supposes besides the config."""

    gpu: Gpu
    layout: Parallelism
    serving: Parallelism
    """The cluster that serves the model: ``n_gpus``, ``tensor`` and ``pipeline`` of it are used."""
    mfu: float = 0.4
    price: float = 1.0
    """Dollars per GPU-hour."""
    context: int | None = None
    """Positions that a token sees, for FLOPs per token and for serving; None is the last stage's sequence length."""
    tokens: float | None = None
    """Training tokens; None is what the schedule says."""
    recompute: bool | None = None
    """Whether activations are computed again in the backward pass; None is ``train.activation_checkpointing``."""
    micro_batch_sequences: int = 1
    failures: Failures = dataclasses.field(default_factory=Failures)
    duration_seconds: float | None = None
    """A duration whose MFU is wanted."""
    budget: float | None = None
    """Dollars whose tokens are wanted."""
    batch: int = 4096
    """Sequences that are served together."""
    acceptance: float = 0.8
    draft_cost: float = 0.05
    gamma: int = 4


def plan_run(config: RunConfig, options: PlanOptions) -> list[PlanSection]:
    """Return the plan of a run, section by section.

    Raises:
        InputError: where a value cannot be, or the layout does not divide the model.
    """
    model, gpu, layout = model_of(config), options.gpu, options.layout
    layout.check(model)
    counts = count_parameters(model)
    compute = compute_section(
        config, gpu, layout, options.mfu, options.price, options.tokens, options.context, counts=counts
    )
    batch = max(config.schedule.stages[-1].batch_range)
    sequences = options.micro_batch_sequences * config.schedule.stages[-1].seq_len
    if layout.batch_ranks * sequences > batch:
        idle = f"{layout.batch_ranks:,} ranks share {batch / sequences:,.4g} micro-batches: the rest of them idles"
        compute = dataclasses.replace(
            compute,
            notes=[f"{idle}, so duration and cost are out of reach: use fewer GPUs or a larger batch.", *compute.notes],
        )
    recompute = config.train.activation_checkpointing if options.recompute is None else options.recompute
    context = options.context or config.schedule.stages[-1].seq_len
    serving = options.serving
    return [
        parameters_section(model, counts),
        compute,
        failures_section(layout, options.mfu, options.price, compute["duration"], options.failures),
        *_inverted(config, options, counts),
        memory_section(config, layout, gpu, recompute, options.micro_batch_sequences, counts),
        communication_section(config, layout, gpu, recompute, options.micro_batch_sequences, counts),
        *inference_sections(
            model,
            gpu,
            n_gpus=serving.n_gpus,
            tensor=serving.tensor,
            pipeline=serving.pipeline,
            batch=options.batch,
            context=context,
            price_per_gpu_hour=options.price,
            acceptance=options.acceptance,
            draft_cost=options.draft_cost,
            gamma=options.gamma,
        ),
        predict_section(model, sum(stage.tokens for stage in stage_tokens(config.schedule, options.tokens))),
        optimal_section(compute["six_n_d"]),
        gpu_section(gpu),
    ]


def _inverted(config: RunConfig, options: PlanOptions, counts: object) -> Iterator[PlanSection]:
    gpu, layout = options.gpu, options.layout
    if options.duration_seconds is not None:
        yield mfu_from_duration(config, gpu, layout, options.duration_seconds, options.tokens, counts)  # type: ignore[arg-type]
    if options.budget is not None:
        yield tokens_from_budget(config, gpu, layout, options.mfu, options.price, options.budget, counts)  # type: ignore[arg-type]


def gpu_section(gpu: Gpu) -> PlanSection:
    """Return the figures of the GPU that the plan reckons with."""
    return PlanSection(
        "gpu",
        f"The GPU: {gpu.name}",
        [
            Quantity("memory", gpu.memory_bytes, "bytes", "Memory", "given", gpu.source),
            Quantity(
                "flops", gpu.bf16_flops, "FLOP/s", "Dense matrix products, bf16 (cpu: float32)", "given", gpu.source
            ),
            Quantity("bandwidth", gpu.bandwidth, "bytes/s", "Memory bandwidth", "given", gpu.source),
            Quantity("link", gpu.link, "bytes/s", "Link within a node, one direction", "given", gpu.source),
            Quantity("network", gpu.network, "bytes/s", "Network between nodes, one direction", "given", gpu.source),
            Quantity("per_node", gpu.per_node, "GPUs", "GPUs of a node", "given", gpu.source),
        ],
    )


def describe(sections: Iterable[PlanSection]) -> str:
    """Return the plan as tables for people; the first column has the names that ``--explain`` takes."""
    parts = []
    for section in sections:
        rows = [(f"{section.name}.{q.name}", q.label, q.shown()) for q in section.quantities]
        table = format_table((section.title, "", ""), rows, left=2)
        parts.append("\n".join([table, *(f"  note: {note}" for note in section.notes)]))
    return "\n\n".join(parts)
