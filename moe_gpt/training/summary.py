"""The summary of a run, shown before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from moe_gpt.measure.flops import stage_tokens, training_flops
from moe_gpt.measure.memory import needed_memory
from moe_gpt.measure.parameters import ParameterCounts, count_parameters
from moe_gpt.measure.shapes import shapes_only
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import describe_device
from moe_gpt.terminal.numbers import format_value
from moe_gpt.training.adapters import adapters_of
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
    total = _size(whole.parameters()) - _size(_parts_of_adapters(whole))  # routers of one's own included
    if make_router is not Router:
        experts += f", routed by {getattr(make_router, '__qualname__', make_router)}"
    lines = [
        f"model      {total:,} parameters, {counts.active + total - counts.total:,} active per token; "
        f"{model.n_layers} layers of width {model.d_model}, {model.n_heads} query heads on {model.n_kv_heads} key-value"
        f", {experts}",
        *_learning(whole),
        f"data       vocabulary {run.data.tokenizer.vocab_size:,}",
        *run.material.describe(run),
        f"schedule   {run.schedule.total_tokens:,} tokens{_big_epochs(run)}",
        *_stages(run),
        _cost(run, counts),
        f"device     {describe_device(run.device)}, {run.precision}" + _ranks(run),
        f"run        {run.run_dir}" + (f", from step {run.state.step}" if run.state.step else ""),
    ]
    if run.identity.initialised_from:
        lines.append(f"           started with the weights of {run.identity.initialised_from}")
    return "\n".join(lines)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _parts_of_adapters(model: MoEGPT) -> list[Tensor]:
    return [part for adapter in adapters_of(model).values() for part in adapter.parameters()]


def _learning(model: MoEGPT) -> Iterator[str]:
    """Yield how many parameters learn, where some do not."""
    learning, in_adapters = _size(p for p in model.parameters() if p.requires_grad), _size(_parts_of_adapters(model))
    if learning < _size(model.parameters()):
        yield f"           {learning:,} parameters learn, {in_adapters:,} of them in adapters; the others are frozen"


def _ranks(run: Run) -> str:
    return f"; {run.team.layout.shown()}" if run.team.size > 1 else ""


def _stages(run: Run) -> Iterator[str]:
    if isinstance(run.schedule, OwnSchedule):
        yield f"           every step is planned by {type(run.schedule.given).__qualname__}, a schedule of your own"
        return
    for stage in run.schedule.stages:
        first, last = stage.config.batch_range
        batch = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        yield f"           until {stage.end:>12,}: sequences of {stage.config.seq_len}, {batch} tokens a step"


def _big_epochs(run: Run) -> str:
    """Return how many big epochs the schedule is; empty if sources have weights, and after pre-training."""
    if run.config.data.has_weights or run.config.stage:
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
