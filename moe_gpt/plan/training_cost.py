"""What a training run computes, how long that takes and what it costs: from a schedule, before anything is run.

Two counts of the same work stand side by side. ``6 N D`` (Kaplan et al., arXiv 2001.08361, section 2.1) is six FLOPs
for each active parameter and token; reports quote it, and their utilisation (MFU) counts it. ``training_flops`` counts
every matrix product of every stage, attention scores at the stage's own length included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from moe_gpt.config import ModelConfig, RunConfig, ScheduleConfig
from moe_gpt.errors import InputError
from moe_gpt.measure.flops import (
    FlopsPerToken,
    StageTokens,
    count_flops,
    multiplied_parameters,
    stage_tokens,
    training_flops,
)
from moe_gpt.measure.parameters import ParameterCounts, count_parameters, model_of
from moe_gpt.plan.hardware import Gpu, Parallelism, check_positive
from moe_gpt.plan.quantities import PlanSection, Quantity
from moe_gpt.terminal.numbers import format_value

_HOUR = 3600.0
_PALM = "PaLM, arXiv 2204.02311, appendix B, with the causal half of the scores"
_KAPLAN = "Kaplan et al., arXiv 2001.08361, section 2.1 (C = 6 N B S)"
_MFU = "PaLM, arXiv 2204.02311, section 4.1; here of all GPUs paid for, spares included"
_DALY = "Daly 2006 (Future Generation Computer Systems 22), complete model for exponential failures"


@dataclasses.dataclass(frozen=True)
class Failures:
    """How often a run breaks, and what it then takes. The times are our assumptions; give your own.

    The default time between failures rounds that of Llama 3's 54 days (arXiv 2407.21783, table 5: 419 unexpected
    interruptions on 16,384 GPUs, one in 50,700 GPU hours).
    """

    gpu_hours_between: float = 50_000.0
    restart_seconds: float = 900.0
    """From a failure to the next useful step, besides the work that is lost."""
    checkpoint_seconds: float = 60.0
    """That training stands still for each checkpoint."""
    interval_seconds: float | None = None
    """Between the ends of checkpoints; None is the one that loses least."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                check_positive(field.name, value)


def compute_section(
    config: RunConfig,
    gpu: Gpu,
    layout: Parallelism,
    mfu: float,
    price_per_gpu_hour: float,
    tokens: float | None = None,
    context: int | None = None,
    counts: ParameterCounts | None = None,
) -> PlanSection:
    """Count what a run computes, and say how long it takes and what it costs.

    Args:
        config: model and schedule.
        gpu: each of them.
        layout: how many there are.
        mfu: share of all GPUs' peak that 6 N D per second comes to.
        price_per_gpu_hour: dollars.
        tokens: to train on, instead of the schedule's.
        context: positions at which FLOPs per token are shown; None is the last stage's. The totals always use each
            stage's own.
        counts: of the model, where they are known already.
    """
    model = model_of(config)
    layout.check(model)
    price = check_positive("price", price_per_gpu_hour)
    counts = counts or count_parameters(model)
    stages = stage_tokens(config.schedule, tokens)
    context = stages[-1].seq_len if context is None else round(check_positive("context", context))
    total_tokens = sum(stage.tokens for stage in stages)
    six_n_d, exact = 6 * multiplied_parameters(model, counts) * total_tokens, training_flops(model, stages, counts)
    speed = layout.n_gpus * gpu.bf16_flops * check_mfu(mfu)
    duration = six_n_d / speed
    return PlanSection(
        "compute",
        f"Compute, time and cost on {layout.n_gpus:,} {gpu.name}",
        [
            *_per_token(count_flops(model, context, counts), context),
            Quantity("tokens", total_tokens, "tokens", "Tokens", "sum over the stages", "schedule"),
            *_stage_flops(model, stages, counts),
            Quantity("six_n_d", six_n_d, "FLOPs", "6 N D", "6 tokens (active - an untied embedding)", _KAPLAN),
            Quantity(
                "training_flops", exact, "FLOPs", "All matrix products, attention scores included",
                "sum over stages of tokens x training FLOPs per token at the stage's seq_len", _PALM,
            ),
            Quantity("flops_over_6nd", exact / six_n_d, "ratio", "All matrix products to 6 N D",
                     "training_flops / six_n_d", "computed"),
            Quantity("gpu_flops", gpu.bf16_flops, "FLOP/s", f"Peak of one {gpu.name}", "bf16, dense", gpu.source),
            Quantity("mfu", mfu, "fraction", "MFU, counting 6 N D", "six_n_d / (duration n_gpus gpu_flops)", _MFU),
            Quantity("mfu_with_scores", mfu * exact / six_n_d, "fraction", "The same, counting all matrix products",
                     "mfu training_flops / six_n_d", _MFU),
            Quantity("tokens_per_second", total_tokens / duration, "tokens/s", "Speed", "tokens / duration",
                     "computed"),
            *_time_and_cost(duration, layout.n_gpus, price, "", "6 N D"),
            *_time_and_cost(exact / speed, layout.n_gpus, price, "_with_scores", "all matrix products"),
        ],
        [
            *_spares(layout),
            "duration and cost take the MFU to count 6 N D, as the reports do; those with scores take it to count all "
            "matrix products, as PaLM does: the same percentage is then a longer run.",
            "Recomputed activations count in neither. MFU counts failures only if the MFU that is given does.",
        ],
    )  # fmt: skip


def check_mfu(mfu: float) -> float:
    """Return the utilisation; InputError unless it is above 0 and at most 1."""
    if check_positive("mfu", mfu) > 1:
        raise InputError(f"mfu must be at most 1 (34 % is 0.34), got {mfu}")
    return float(mfu)


def _per_token(flops: FlopsPerToken, context: int) -> Iterator[Quantity]:
    labels = {
        "attention_projections": ("Attention projections", "2 attention parameters met"),
        "attention_scores": (f"Attention scores at {context:,} positions", "2 n_layers n_heads head_dim (context + 1)"),
        "feed_forward": ("Experts", "2 top_k per_expert"),
        "router": ("Routers", "2 router"),
        "output": ("Output matrix", "2 d_model vocab_size"),
    }
    yield Quantity(
        "context", context, "tokens", "Context of the FLOPs per token", "given, or the last stage's", "given"
    )
    for part, (label, formula) in labels.items():
        yield Quantity(f"forward_{part}", getattr(flops, part), "FLOPs/token", f"Forward: {label}", formula, _PALM)
    yield Quantity("forward", flops.forward, "FLOPs/token", "Forward", "sum of the parts", _PALM)
    yield Quantity("backward", flops.backward, "FLOPs/token", "Backward, each part", "2 forward", _PALM)
    yield Quantity("training", flops.training, "FLOPs/token", "Forward and backward", "3 forward", _PALM)


def _stage_flops(model: ModelConfig, stages: list[StageTokens], counts: ParameterCounts) -> Iterator[Quantity]:
    for index, stage in enumerate(stages):
        yield Quantity(
            f"stage_{index}_flops",
            training_flops(model, [stage], counts),
            "FLOPs",
            f"Stage {index}: {format_value(stage.tokens, 'tokens')} tokens at {stage.seq_len:,} positions",
            f"tokens x training FLOPs per token at {stage.seq_len} positions",
            _PALM,
        )


def _time_and_cost(duration: float, n_gpus: int, price: float, suffix: str, counted: str) -> list[Quantity]:
    source = f"computed from the MFU, counting {counted}"
    return [
        Quantity(f"duration{suffix}", duration, "seconds", f"Duration ({counted})", "FLOPs / (n_gpus gpu_flops mfu)",
                 source),
        Quantity(f"gpu_hours{suffix}", duration * n_gpus / _HOUR, "count", f"GPU hours ({counted})",
                 "duration n_gpus / 3600", source),
        Quantity(f"cost{suffix}", duration * n_gpus / _HOUR * price, "dollars", f"Cost ({counted})",
                 "gpu_hours price_per_gpu_hour", source),
    ]  # fmt: skip


def _spares(layout: Parallelism) -> list[str]:
    if not layout.spares:
        return []
    return [
        f"{layout.n_gpus:,} GPUs = {layout.data_parallel:,} x {layout.model_gpus:,} + {layout.spares:,}: the last "
        f"{layout.spares:,} are spares. MFU and cost count all that are paid for, the spares, too."
    ]


def mfu_from_duration(
    config: RunConfig,
    gpu: Gpu,
    layout: Parallelism,
    duration_seconds: float,
    tokens: float | None = None,
    counts: ParameterCounts | None = None,
) -> PlanSection:
    """Return the utilisation that a run of a known duration had, over all GPUs paid for."""
    model = model_of(config)
    counts = counts or count_parameters(model)
    stages = stage_tokens(config.schedule, tokens)
    peak = layout.n_gpus * gpu.bf16_flops * check_positive("duration", duration_seconds)
    total_tokens = sum(stage.tokens for stage in stages)
    six_n_d, exact = 6 * multiplied_parameters(model, counts) * total_tokens, training_flops(model, stages, counts)
    is_possible = exact <= peak
    return PlanSection(
        "mfu_from_duration",
        "MFU from a duration",
        [
            Quantity("duration", float(duration_seconds), "seconds", "Duration", "given", "given"),
            Quantity("mfu", six_n_d / peak, "fraction", "MFU, counting 6 N D", "six_n_d / (duration n_gpus gpu_flops)",
                     _MFU),
            Quantity("mfu_with_scores", exact / peak, "fraction", "MFU, counting all matrix products",
                     "training_flops / (duration n_gpus gpu_flops)", _MFU),
        ],
        _spares(layout) + ([] if is_possible else ["No hardware is that fast: it would be more than its peak."]),
    )  # fmt: skip


def tokens_from_budget(
    config: RunConfig,
    gpu: Gpu,
    layout: Parallelism,
    mfu: float,
    price_per_gpu_hour: float,
    dollars: float,
    counts: ParameterCounts | None = None,
) -> PlanSection:
    """Return the tokens that a sum of money trains on, by 6 N D and by the stages' own FLOPs."""
    model = model_of(config)
    counts = counts or count_parameters(model)
    gpu_seconds = check_positive("budget", dollars) / check_positive("price", price_per_gpu_hour) * _HOUR
    flops = gpu_seconds * gpu.bf16_flops * check_mfu(mfu)
    return PlanSection(
        "tokens_from_budget",
        "Tokens from a budget",
        [
            Quantity("budget", float(dollars), "dollars", "Budget", "given", "given"),
            Quantity("flops", flops, "FLOPs", "FLOPs it pays for", "budget / price 3600 gpu_flops mfu", _MFU),
            Quantity("tokens", flops / (6 * multiplied_parameters(model, counts)), "tokens", "Tokens (6 N D)",
                     "flops / (6 N)", _KAPLAN),
            Quantity("tokens_with_scores", _tokens_for(flops, model, config.schedule, counts), "tokens",
                     "Tokens (all matrix products)",
                     "the tokens at which training_flops is flops; the last stage is prolonged", _PALM),
            Quantity("duration", gpu_seconds / layout.n_gpus, "seconds", f"Duration on {layout.n_gpus:,} GPUs",
                     "budget / price 3600 / n_gpus", "computed"),
        ],
        _spares(layout),
    )  # fmt: skip


def _tokens_for(flops: float, model: ModelConfig, schedule: ScheduleConfig, counts: ParameterCounts) -> float:
    start = 0
    for stage in schedule.stages[:-1]:
        each = count_flops(model, stage.seq_len, counts).training
        assert stage.until_tokens is not None, "only the last stage may be open"
        if flops <= (stage.until_tokens - start) * each:
            return start + flops / each
        flops -= (stage.until_tokens - start) * each
        start = stage.until_tokens
    return start + flops / count_flops(model, schedule.stages[-1].seq_len, counts).training


def failures_section(
    layout: Parallelism,
    mfu: float,
    price_per_gpu_hour: float,
    duration_seconds: float,
    failures: Failures | None = None,
) -> PlanSection:
    """Say what failures cost a run, and how often to save.

    Any failure of a GPU that works stops all of them; they come independently of each other, at a constant rate.

    Args:
        layout: how many work, and how many are paid for.
        mfu: of the run without failures.
        price_per_gpu_hour: dollars.
        duration_seconds: of the run without failures and checkpoints.
        failures: how often, and how long.
    """
    failures = failures or Failures()
    between = failures.gpu_hours_between * _HOUR / layout.used
    best = best_interval(between, failures.checkpoint_seconds)
    interval = failures.interval_seconds or best
    useful = goodput(interval, between, failures.checkpoint_seconds, failures.restart_seconds)
    price = check_positive("price", price_per_gpu_hour)
    duration = check_positive("duration", duration_seconds)
    total = duration / useful if useful else math.inf
    ours = "assumption, to be given"
    return PlanSection(
        "failures",
        f"Failures on {layout.used:,} working GPUs",
        [
            Quantity("gpu_seconds_between_failures", failures.gpu_hours_between * _HOUR, "seconds",
                     "Mean time between failures of one GPU", "given",
                     "Llama 3, arXiv 2407.21783, table 5: 54 days x 24 h x 16,384 / 419 = 50,700 GPU hours; "
                     "rounded to 50,000"),
            Quantity("seconds_between_failures", between, "seconds", "Mean time between failures of the run",
                     "gpu_seconds_between_failures / working GPUs", "independent failures"),
            Quantity("expected_failures", total / between, "count", "Expected failures",
                     "duration_with_failures / seconds_between_failures", "independent failures"),
            Quantity("restart", failures.restart_seconds, "seconds", "Restart after a failure", "given", ours),
            Quantity("checkpoint", failures.checkpoint_seconds, "seconds", "Standstill for a checkpoint", "given",
                     ours),
            Quantity("best_interval", best, "seconds", "Interval between checkpoints that loses least, to first order",
                     "sqrt(2 checkpoint seconds_between_failures)", "Young 1974; first order of Daly 2006"),
            Quantity("interval", interval, "seconds", "Interval between checkpoints",
                     "given, or best_interval", "given"),
            Quantity("goodput", useful, "fraction", "Goodput: useful share of the time",
                     "interval / (M exp(restart / M) (exp((interval + checkpoint) / M) - 1)), "
                     "M = seconds_between_failures", _DALY),
            Quantity("effective_mfu", mfu * useful, "fraction", "MFU with failures", "mfu goodput", _DALY),
            Quantity("duration_with_failures", total, "seconds", "Duration with failures", "duration / goodput", _DALY),
            Quantity("cost_with_failures", total * layout.n_gpus / _HOUR * price, "dollars", "Cost with failures",
                     "duration_with_failures n_gpus price_per_gpu_hour / 3600", _DALY),
        ],
        ["The given duration has no failures in it. An MFU measured over a whole run has, and needs none of this."
         if useful else "The run fails faster than it can be restarted: it never ends."],
    )  # fmt: skip


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
