"""The summary of a run, shown before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from moe_gpt.measure.flops import stage_tokens, training_flops
from moe_gpt.measure.memory import needed_memory
from moe_gpt.measure.parameters import ParameterCounts, count_parameters
from moe_gpt.measure.shapes import shapes_only
from moe_gpt.model.router import Router
from moe_gpt.ops.device import describe_device
from moe_gpt.terminal.numbers import format_value
from moe_gpt.training.loop import Limits
from moe_gpt.training.saving.size import checkpoint_bytes
from moe_gpt.training.schedule import OwnSchedule, tokens_after
from moe_gpt.training.setup import Run


def describe_run(run: Run) -> str:
    """Return what will be trained: parameters, data, stages, device and precision."""
    model, counts = run.config.model, count_parameters(run.config.model)
    experts = "dense" if model.is_dense else f"{model.n_experts} experts, top-{model.top_k}, balance by {model.balance}"
    make_router = run.state.model.make_router
    whole = run.state.model if run.team.size == 1 else shapes_only(model, make_router)
    total = sum(parameter.numel() for parameter in whole.parameters())  # routers of one's own included
    if make_router is not Router:
        experts += f", routed by {getattr(make_router, '__qualname__', make_router)}"
    lines = [
        f"model      {total:,} parameters, {counts.active + total - counts.total:,} active per token; "
        f"{model.n_layers} layers of width {model.d_model}, {model.n_heads} query heads on {model.n_kv_heads} key-value"
        f", {experts}",
        f"data       vocabulary {run.data.tokenizer.vocab_size:,}",
        *_sources(run),
        *_without_validation(run),
        f"schedule   {run.schedule.total_tokens:,} tokens{_big_epochs(run)}",
        *_stages(run),
        _cost(run, counts),
        f"device     {describe_device(run.device)}, {run.precision}" + _ranks(run),
        f"run        {run.run_dir}" + (f", from step {run.state.step}" if run.state.step else ""),
    ]
    if run.identity.initialised_from:
        lines.append(f"           started with the weights of {run.identity.initialised_from}")
    return "\n".join(lines)


def _ranks(run: Run) -> str:
    return f"; {run.team.layout.shown()}" if run.team.size > 1 else ""


def _sources(run: Run) -> Iterator[str]:
    for source in run.data.sources:
        name = source.config.name
        held_out = f"{len(source.validation):,} held-out tokens" if len(source.validation) else "no held-out tokens"
        yield (
            f"           {name}: {len(source.train):,} training and {held_out}; "
            f"this run reads the training tokens {run.passes[name]:.2f} times"
        )


def _without_validation(run: Run) -> Iterator[str]:
    if not run.config.data.validation_fraction:
        yield "note       all text is for training (data.validation_fraction=0), so there is no validation loss;"
        yield "           moe-gpt evaluate RUN --files measures the loss of other text"


def _stages(run: Run) -> Iterator[str]:
    if isinstance(run.schedule, OwnSchedule):
        yield f"           every step is planned by {type(run.schedule.given).__qualname__}, a schedule of your own"
        return
    for stage in run.schedule.stages:
        first, last = stage.config.batch_range
        batch = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        yield f"           until {stage.end:>12,}: sequences of {stage.config.seq_len}, {batch} tokens a step"


def _big_epochs(run: Run) -> str:
    """Return how many big epochs the schedule is; empty if sources have weights instead of epochs."""
    if run.config.data.has_weights:
        return ""
    big_epoch = sum(source.config.passes * len(source.train) for source in run.data.sources)
    return f", {run.schedule.total_tokens / big_epoch:.2f} big epochs"


def _cost(run: Run, counts: ParameterCounts) -> str:
    flops = training_flops(run.config.model, stage_tokens(run.config.schedule), counts)
    memory = needed_memory(run.config, run.device, run.precision, counts)
    return (
        f"plan       {format_value(flops, 'FLOPs')} in matrix products; training needs {memory.shown()} of memory, "
        f"a checkpoint {format_value(checkpoint_bytes(run.config).total, 'bytes')}"
    )


def note_on_schedule(run: Run, limits: Limits) -> str:
    """Return how a limit affects the learning rate; empty where the limit ends no run early."""
    if limits.max_minutes is not None:
        return (
            f"note       --max-minutes {limits.max_minutes:g} may end this run early; the learning rate follows the "
            "whole schedule; to shrink the schedule, use --fit-schedule with --max-steps"
        )
    if limits.max_steps is None or run.state.step >= limits.max_steps:
        return ""
    end = tokens_after(run.schedule, limits.max_steps - run.state.step, run.state.tokens_seen)
    if end >= run.schedule.total_tokens:
        return ""
    share = end / run.schedule.total_tokens
    return (
        f"note       --max-steps {limits.max_steps} ends this run after {end:,} tokens, {share:.1%} of the schedule; "
        "the learning rate follows the whole schedule; --fit-schedule shrinks the schedule to these steps"
    )
