"""What a training run computes, how long that takes and what it costs: from a schedule, before anything is run.

Two counts of the same work stand side by side. ``6 N D`` (Kaplan et al., arXiv 2001.08361, section 2.1) is six FLOPs
for each active parameter and token; reports quote it, and their utilisation (MFU) counts it. ``training_flops`` counts
every matrix product of every stage, attention scores at the stage's own length included.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe_gpt.config import DataConfig, ModelConfig, RunConfig, ScheduleConfig
from moe_gpt.measure.flops import StageTokens, count_flops, multiplied_parameters, stage_tokens, training_flops
from moe_gpt.measure.parameters import model_of
from moe_gpt.plan.options import PlanOptions
from moe_gpt.plan.parameters import counts_of
from moe_gpt.plan.quantities import Member, PlanSection, plan_section
from moe_gpt.terminal.numbers import format_value

_HOUR = 3600.0


class TrainingWork(NamedTuple):
    """What a run computes."""

    stages: list[StageTokens]
    tokens: int
    six_n_d: int
    training_flops: int
    """All matrix products."""
    is_at_most: bool
    """Whether the data, which was not counted yet, may have fewer tokens."""


def training_work(config: RunConfig, tokens: float | None = None) -> TrainingWork:
    """Count what a run computes: on so many tokens, or on the schedule's, or on the most that its sources can give.

    Raises:
        InputError: where the schedule ends with the data and a source has no ``max_tokens``; or tokens cannot be.
    """
    is_at_most = tokens is None and config.schedule.stages[-1].until_tokens is None
    model = model_of(config)
    stages = stage_tokens(config.schedule, most_tokens(config.data) if is_at_most else tokens)
    counts, total = counts_of(model), sum(stage.tokens for stage in stages)
    six_n_d = 6 * multiplied_parameters(model, counts) * total
    return TrainingWork(stages, total, six_n_d, training_flops(model, stages, counts), is_at_most)


def most_tokens(data: DataConfig) -> int | None:
    """Return the tokens of one big epoch at the most, max_tokens times epochs; None where a source has no limit."""
    limits = [source.max_tokens and source.max_tokens * (source.epochs or 1) for source in data.sources]
    return None if None in limits else int(sum(filter(None, limits)))


def compute_section(config: RunConfig, options: PlanOptions) -> PlanSection:
    """Count what a run computes, and say how long it takes and what it costs.

    ``options.context`` only decides at how many positions FLOPs per token are shown (None: the last stage's). The
    totals always use each stage's own.
    """
    model, gpu, layout = model_of(config), options.gpu, options.layout
    layout.check(model)
    work = training_work(config, options.tokens)
    context = work.stages[-1].seq_len if options.context is None else options.context
    flops = count_flops(model, context, counts_of(model))
    mfu = options.utilisation(model)
    speed = layout.n_gpus * gpu.bf16_flops * mfu
    duration = work.six_n_d / speed
    values = {
        "context": context,
        **{f"forward_{part}": value for part, value in flops._asdict().items()},
        "forward": flops.forward,
        "backward": flops.backward,
        "training": flops.training,
        "tokens": work.tokens,
        **{f"stage_{index}_flops": _flops_of_stage(model, index, stage) for index, stage in enumerate(work.stages)},
        "six_n_d": work.six_n_d,
        "training_flops": work.training_flops,
        "flops_over_6nd": work.training_flops / work.six_n_d,
        "gpu_flops": gpu.bf16_flops,
        "mfu": mfu,
        "mfu_with_scores": mfu * work.training_flops / work.six_n_d,
        "tokens_per_second": work.tokens / duration,
        **_time_and_cost(duration, options),
        **_time_and_cost(work.training_flops / speed, options, "_with_scores"),
    }
    applies = {
        "at_most": work.is_at_most,
        "idle": idles(config, options),
        "spares": layout.spares > 0,
        "of_cpu": gpu.is_cpu and options.mfu is None,
    }
    micro_batches = _micro_batches(config, options)
    return plan_section("compute", values, applies, options=options, context=context, micro_batches=micro_batches)


def idles(config: RunConfig, options: PlanOptions) -> bool:
    """Return whether even the largest batch has fewer micro-batches than there are ranks."""
    return options.layout.batch_ranks > _micro_batches(config, options)


def _micro_batches(config: RunConfig, options: PlanOptions) -> float:
    last = config.schedule.stages[-1]
    return max(last.batch_range) / (options.micro_batch_sequences * last.seq_len)


def _flops_of_stage(model: ModelConfig, index: int, stage: StageTokens) -> Member:
    words = {"index": index, "tokens": format_value(stage.tokens, "tokens"), "seq_len": stage.seq_len}
    return Member(training_flops(model, [stage], counts_of(model)), words)


def _time_and_cost(duration: float, options: PlanOptions, suffix: str = "") -> dict[str, float]:
    gpu_hours = duration * options.layout.n_gpus / _HOUR
    return {
        f"duration{suffix}": duration,
        f"gpu_hours{suffix}": gpu_hours,
        f"cost{suffix}": gpu_hours * options.price,
    }


def mfu_from_duration(config: RunConfig, options: PlanOptions, duration_seconds: float) -> PlanSection:
    """Return the utilisation that a run of a known duration had, over all GPUs paid for."""
    layout, work = options.layout, training_work(config, options.tokens)
    peak = layout.n_gpus * options.gpu.bf16_flops * duration_seconds
    values = {
        "duration": float(duration_seconds),
        "mfu": work.six_n_d / peak,
        "mfu_with_scores": work.training_flops / peak,
    }
    applies = {"spares": layout.spares > 0, "impossible": work.training_flops > peak}
    return plan_section("mfu_from_duration", values, applies, options=options)


def tokens_from_budget(config: RunConfig, options: PlanOptions, dollars: float) -> PlanSection:
    """Return the tokens that a sum of money trains on, by 6 N D and by the stages' own FLOPs."""
    model, layout = model_of(config), options.layout
    gpu_seconds = dollars / options.price * _HOUR
    flops = gpu_seconds * options.gpu.bf16_flops * options.utilisation(model)
    values = {
        "budget": float(dollars),
        "flops": flops,
        "tokens": flops / (6 * multiplied_parameters(model, counts_of(model))),
        "tokens_with_scores": _tokens_for(flops, model, config.schedule),
        "duration": gpu_seconds / layout.n_gpus,
    }
    return plan_section("tokens_from_budget", values, {"spares": layout.spares > 0}, options=options)


def _tokens_for(flops: float, model: ModelConfig, schedule: ScheduleConfig) -> float:
    start = 0
    for stage in schedule.stages[:-1]:
        each = count_flops(model, stage.seq_len, counts_of(model)).training
        assert stage.end is not None, "only the last stage may be open"
        if flops <= (stage.end - start) * each:
            return start + flops / each
        flops -= (stage.end - start) * each
        start = stage.end
    return start + flops / count_flops(model, schedule.stages[-1].seq_len, counts_of(model)).training


def failures_section(options: PlanOptions, duration_seconds: float, mfu: float) -> PlanSection:
    """Say what failures cost a run, and how often to save; duration and MFU are those without failures and checkpoints.

    Any failure of a GPU that works stops all of them; they come independently of each other, at a constant rate.
    """
    layout, failures = options.layout, options.failures
    between = failures.gpu_hours_between * _HOUR / layout.used
    best = best_interval(between, failures.checkpoint_seconds)
    interval = failures.interval_seconds or best
    useful = goodput(interval, between, failures.checkpoint_seconds, failures.restart_seconds)
    total = duration_seconds / useful if useful else math.inf
    values = {
        "gpu_seconds_between_failures": failures.gpu_hours_between * _HOUR,
        "seconds_between_failures": between,
        "expected_failures": total / between,
        "restart": failures.restart_seconds,
        "checkpoint": failures.checkpoint_seconds,
        "best_interval": best,
        "interval": interval,
        "goodput": useful,
        "effective_mfu": mfu * useful,
        "duration_with_failures": total,
        "cost_with_failures": total * layout.n_gpus / _HOUR * options.price,
    }
    return plan_section("failures", values, {"not_counted": useful > 0, "never_ends": useful == 0}, options=options)


def best_interval(seconds_between_failures: float, checkpoint_seconds: float) -> float:
    """Return the useful seconds between checkpoints that lose least to both, sqrt(2 δ M) (Young 1974; Daly 2006)."""
    return math.sqrt(2 * checkpoint_seconds * seconds_between_failures)


def goodput(
    interval_seconds: float, seconds_between_failures: float, checkpoint_seconds: float, restart_seconds: float
) -> float:
    """Return the expected useful share of the time (Daly 2006): interval / (interval + checkpoint) if nothing fails."""
    between = seconds_between_failures
    try:
        spent = between * math.exp(restart_seconds / between)
        spent *= math.expm1((interval_seconds + checkpoint_seconds) / between)
    except OverflowError:
        return 0.0
    return interval_seconds / spent
