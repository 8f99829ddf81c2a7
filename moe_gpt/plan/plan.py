"""The plan of a run: every section for a config, hardware and prices, and how people read it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from moe_gpt.config import RunConfig
from moe_gpt.measure.parameters import model_of
from moe_gpt.plan.communication import communication_section
from moe_gpt.plan.hardware import Parallelism, gpu_section
from moe_gpt.plan.memory import memory_section
from moe_gpt.plan.options import PlanOptions
from moe_gpt.plan.parameters import parameters_section
from moe_gpt.plan.quantities import PlanSection, plan_section
from moe_gpt.plan.scaling_laws import optimal_section, predict_section
from moe_gpt.plan.serving import serving_sections, speculation_section
from moe_gpt.plan.training_cost import compute_section, failures_section, mfu_from_duration, tokens_from_budget
from moe_gpt.terminal.tables import format_table
from moe_gpt.terminal.wrapping import wrap


def plan_run(config: RunConfig, options: PlanOptions) -> list[PlanSection]:
    """Return the plan of a run, section by section.

    Raises:
        InputError: where a value cannot be, or the layout does not divide the model.
    """
    model, gpu, layout = model_of(config), options.gpu, options.layout
    layout.check(model)
    recompute = config.train.activation_checkpointing if options.recompute is None else options.recompute
    context = options.context or config.schedule.stages[-1].seq_len
    compute, asked = compute_section(config, options), []
    if options.duration_seconds is not None:
        asked.append(mfu_from_duration(config, options, options.duration_seconds))
    if options.budget is not None:
        asked.append(tokens_from_budget(config, options, options.budget))
    return [
        parameters_section(model),
        compute,
        failures_section(options, compute["duration"], compute["mfu"]),
        *asked,
        memory_section(config, layout, gpu, recompute, options.micro_batch_sequences),
        communication_section(config, layout, gpu, recompute, options.micro_batch_sequences),
        _own_section(config, options, compute),
        *serving_sections(model, options, context),
        speculation_section(model, options, context),
        predict_section(model, compute["tokens"]),
        optimal_section(compute["six_n_d"]),
        gpu_section(gpu),
    ]


def _own_section(config: RunConfig, options: PlanOptions, compute: PlanSection) -> PlanSection:
    """Say what moe_gpt itself takes, which trains on one device in the micro-batches of the config."""
    longest = max(stage.seq_len for stage in config.schedule.stages)
    n_sequences = max(1, config.train.micro_batch_tokens // longest)
    memory = memory_section(config, Parallelism(1), options.gpu, config.train.activation_checkpointing, n_sequences)
    duration = compute["six_n_d"] / (options.gpu.bf16_flops * compute["mfu"])
    values = {"duration": duration, **{name: memory[name] for name in ("total", "available", "fits")}}
    words = {"gpu": options.gpu, "n_tokens": n_sequences * longest}
    return plan_section("moe_gpt", values, {"does_not_fit": not memory["fits"]}, **words)


_OF_CLUSTERS = "|".join(map(fnmatch.translate, (
    "failures.*", "communication.*", "tokens_from_budget.*", "*.gpu_hours*", "*.spare_gpus", "*.gpus_per_copy",
    "*.copies", "*.*_cluster", "*.cost*", "gpu.link", "gpu.network", "gpu.per_node",
)))  # fmt: skip
"""Names of numbers that mean nothing on one CPU."""


def describe(sections: Iterable[PlanSection], options: PlanOptions | None = None) -> str:
    """Return the plan as tables for people; the first column has the names that ``--explain`` takes.

    With the options of one CPU, what only clusters have is left out.
    """
    left_out = _OF_CLUSTERS if options and options.is_one_cpu else "(?!)"
    parts = []
    for section in sections:
        rows = [(f"{section.name}.{q.name}", q.label, q.shown()) for q in section.quantities]
        rows = [row for row in rows if not re.match(left_out, row[0])]
        if rows:
            table = format_table((section.title, "", ""), rows, left=2)
            parts.append("\n".join([table, *(wrap(f"  note: {note}") for note in section.notes)]))
    return "\n\n".join(parts)
