"""What was publicly reported about GPT-4, each claim beside the value computed here: ``docs/the-report-checked.md``.

The claims circulated from 2020 to 2023 (the SemiAnalysis report of July 2023 and what was written about it, George
Hotz in June 2023, forecasts of 2022); OpenAI has confirmed none. They are checked with ``configs/gpt4.yaml``,
whose widths are our derivation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from moe_gpt.config import RunConfig
from moe_gpt.measure.flops import count_flops, stage_tokens, training_flops
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.hardware import GPUS, Parallelism
from moe_gpt.plan.inference_cost import Layout as ServingLayout
from moe_gpt.plan.inference_cost import (
    compute_bound_batch,
    expected_experts_touched,
    expected_tokens_per_step,
    kv_cache_bytes_per_token,
    tokens_per_expert,
    weight_bytes_per_gpu,
)
from moe_gpt.terminal.numbers import Unit, format_value

_CLOSE = 0.015
"""Difference up to which a claim that says a number exactly is called consistent; "about" allows what its row says."""
_DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A reported claim and what is computed for it."""

    topic: str
    claim: str
    unit: Unit = "text"
    reported: float | None = None
    """None where the claim is no number, or nothing can be computed for it."""
    computed: float | None = None
    how: str = ""
    """The formula with its numbers, or why nothing can be said."""
    assumption: str = ""
    """What has to be supposed for the computation and no report says."""
    tolerance: float = _CLOSE
    holds: bool | None = None
    """Of a statement without a number, whether it is true; None where that cannot be known or a number decides."""

    @property
    def difference(self) -> float | None:
        """Computed over reported, minus 1."""
        if self.reported is None or self.computed is None:
            return None
        return self.computed / self.reported - 1

    @property
    def verdict(self) -> str:
        """What comes of it: of a number by the difference alone, of a statement by whether it holds."""
        holds = self.holds
        if holds is None and self.difference is not None:
            holds = abs(self.difference) <= self.tolerance
        if holds is None:
            return "cannot be known"
        if not holds:
            return "contradicts"
        return "consistent with a stated assumption" if self.assumption else "consistent"


_WIDTHS = "the widths of configs/gpt4.yaml"


def check_claims(config: RunConfig) -> list[Claim]:
    """Return every claim of the reports, checked with the shape and schedule of ``configs/gpt4.yaml``."""
    return [*_size(config), *_training(config), *_memory(config), *_serving(config), *_other()]


def _size(config: RunConfig) -> Iterator[Claim]:
    model, counts = config.model, count_parameters(config.model)
    yield Claim(
        "size",
        "16 experts of about 111 B and 55 B of attention: 1831 B parameters",
        "parameters",
        16 * 111e9 + 55e9,
        counts.total,
        "counted on the meta device, embeddings included",
        _WIDTHS,
    )
    yield Claim(
        "size",
        "about 111 B parameters in an expert",
        "parameters",
        111e9,
        counts.per_expert,
        f"{model.n_layers} x 3 x {model.d_model} x {model.d_ff}",
        _WIDTHS,
    )
    yield Claim(
        "size",
        "about 55 B parameters of attention, shared by all experts",
        "parameters",
        55e9,
        counts.attention,
        "120 x (two matrices of d_model x 2 d_model, one key-value head)",
        _WIDTHS,
    )
    yield Claim(
        "size",
        "about 280 B parameters used for a token",
        "parameters",
        280e9,
        counts.active,
        "total minus 14 experts",
        _WIDTHS,
    )
    yield Claim(
        "size",
        "more than 10 times GPT-3",
        "ratio",
        10,
        counts.total / 175e9,
        "total / 175e9",
        holds=counts.total > 10 * 175e9,
    )
    yield Claim(
        "size",
        "8 x 220 B (Hotz, June 2023) against 16 x 111 B",
        "parameters",
        8 * 220e9,
        counts.total,
        "the totals agree within 5 %, the numbers of experts do not",
        holds=False,
    )
    forward = 2 * counts.active
    yield Claim(
        "compute",
        '"560 TFLOPs" for a token',
        "FLOPs/token",
        560e12,
        forward,
        "2 x active: 0.56 TFLOP; the unit is wrong by 1000",
        holds=False,
    )
    yield Claim(
        "compute",
        "a dense model of that size would take about 3.7 TFLOP for a token",
        "FLOPs/token",
        3.7e12,
        2.0 * counts.total,
        "2 x total",
    )


def _training(config: RunConfig) -> Iterator[Claim]:
    counts, stages = count_parameters(config.model), stage_tokens(config.schedule)
    tokens, peak = sum(stage.tokens for stage in stages), GPUS["a100-80gb"].bf16_flops
    six_n_d, exact = 6.0 * counts.active * 13e12, training_flops(config.model, stages, counts)
    yield Claim(
        "data",
        "13 T tokens = 2 x (3.9 T of text + 2 x 1.3 T of code)",
        "tokens",
        13e12,
        2 * (3.9e12 + 2 * 1.3e12),
        "two big epochs of 6.5 T; the other version, 2 epochs of text and 4 of code, is the same",
    )
    yield Claim("data", "40 % of a big epoch is code", "fraction", 0.4, 2 * 1.3 / 6.5, "2 x 1.3 / 6.5")
    yield Claim("compute", "2.15e25 FLOPs", "FLOPs", 2.15e25, six_n_d, "6 x active x 13e12", _WIDTHS)
    yield Claim(
        "compute",
        "2.15e25 FLOPs, attention scores counted over the curriculum",
        "FLOPs",
        2.15e25,
        exact,
        f"all matrix products over {len(stages)} stages and {tokens / 1e12:.1f} T tokens",
        "our steps of the sequence length",
        tolerance=0.1,
    )
    days = 95.0
    mfu = six_n_d / (25_000 * peak * days * _DAY)
    yield Claim(
        "training",
        "25,000 A100 for 90 to 100 days at 32 to 36 % MFU",
        "fraction",
        0.34,
        mfu,
        "2.175e25 / (25,000 x 312e12 x 95 days)",
        "95 days",
        tolerance=0.06,
    )
    yield Claim(
        "training",
        "25,000 A100 against 20,000 in another version",
        "GPUs",
        20_000,
        25_000,
        "20,000 for 95 days would be 42.5 % MFU",
        holds=False,
    )
    cost = six_n_d / (peak * 0.34) / 3600
    yield Claim(
        "training",
        "about $63 M at $1 per A100-hour",
        "dollars",
        63e6,
        cost,
        f"2.175e25 / (312e12 x 0.34) / 3600: 25,000 GPUs for {cost / 25_000 / 24:.1f} days. $63 M would be "
        f"{63e6 / 25_000 / 24:.0f} days, or {six_n_d / (peak * 63e6 * 3600):.1%} MFU",
        "34 % MFU",
    )
    h100 = 8192 * 55 * 24 * 2.0
    yield Claim("training", "8,192 H100 for 55 days at $2: $21.5 M", "dollars", 21.5e6, h100, "8192 x 55 x 24 x 2")
    yield Claim(
        "training",
        "the same, its implied MFU",
        "fraction",
        None,
        None,
        f"2.175e25 / (8192 x 989e12 x 55 days) = {six_n_d / (8192 * 989.4e12 * 55 * _DAY):.0%}: in bf16 more than "
        "anybody reports for such a size; with FP8 half of that share",
    )
    yield Claim(
        "batch",
        "60 M tokens are 7.5 M tokens for each expert",
        "tokens",
        7.5e6,
        tokens_per_expert(16, 2, 60_000_000),
        "60e6 x 2 / 16",
    )
    yield Claim(
        "batch",
        '"60 million": of tokens or of sequences?',
        "tokens",
        None,
        None,
        "60 M sequences of 8k would be 0.5 T tokens, 26 steps in all; tokens are meant",
        holds=False,
    )


def _memory(config: RunConfig) -> Iterator[Claim]:
    model, counts = config.model, count_parameters(config.model)
    layout = Parallelism(25_000, tensor=8, pipeline=15)
    yield Claim(
        "parallelism",
        "about 30 GB of fp16 weights on a GPU (8-way tensor, 15-way pipeline)",
        "bytes",
        30e9,
        2 * counts.total / (8 * 15),
        "2 bytes x total / 120",
        _WIDTHS,
        tolerance=0.02,
    )
    yield Claim("parallelism", "15 stages of 8 layers", "count", 8, model.n_layers / 15, "120 / 15")
    yield Claim(
        "parallelism",
        "heads divide by 8-way tensor parallelism",
        "count",
        None,
        None,
        f"{model.n_heads} / 8 = {model.n_heads // 8}: true of our derivation, which was chosen for it",
    )
    yield Claim(
        "parallelism",
        "25,000 GPUs in groups of 120",
        "GPUs",
        25_000,
        layout.used,
        f"{layout.data_parallel} x 120 + {layout.spares} spares",
    )
    yield Claim(
        "parallelism",
        "15-way pipeline in training against 16-way in inference",
        "count",
        15,
        16,
        "120 layers do not divide by 16: some stages would have 7 layers and some 8",
        holds=False,
    )


def _serving(config: RunConfig) -> Iterator[Claim]:
    model = config.model
    per_token = kv_cache_bytes_per_token(model)
    full = kv_cache_bytes_per_token(model, model.n_heads)
    weights = weight_bytes_per_gpu(model, ServingLayout(8, 16))
    flops_ratio = count_flops(model, 8192).forward / (2 * 175e9 + 4 * 96 * 12_288 * 2049 / 2)
    yield Claim(
        "attention",
        "without multi-query attention 32k contexts do not fit on 40 GB GPUs",
        "bytes",
        None,
        None,
        f"32k positions take {format_value(32_768 * per_token, 'bytes')} with one key-value head, "
        f"{format_value(32_768 * full, 'bytes')} with {model.n_heads}: shared by 128 GPUs that is "
        f"{format_value(32_768 * full / 128, 'bytes')} of each beside {format_value(weights, 'bytes')} of weights: "
        "three sequences would fit, and no larger batch; how the cache was to be shared is not reported",
    )
    yield Claim(
        "inference",
        "batches of 4k and more are about 500 tokens for each expert",
        "tokens",
        500,
        tokens_per_expert(16, 2, 4096),
        "4096 x 2 / 16",
        tolerance=0.03,
    )
    yield Claim(
        "inference",
        "at small batches experts idle",
        "count",
        None,
        None,
        f"in expectation a batch of 4 touches {expected_experts_touched(16, 2, 4):.1f} of 16 experts, one of 16 "
        f"{expected_experts_touched(16, 2, 16):.1f}; decoding is bound by computing only from a batch of "
        f"{compute_bound_batch(model, GPUS['a100-80gb']):,.0f} on A100",
        holds=True,
    )
    yield Claim(
        "inference",
        "speculative decoding, about 4 tokens at a time",
        "tokens",
        4,
        expected_tokens_per_step(0.8, 6),
        "(1 - a^7) / (1 - a)",
        "80 % of drafted tokens accepted, 6 drafted",
        tolerance=0.05,
    )
    yield Claim(
        "inference",
        "3 times the cost of the 175 B predecessor",
        how=f"a token at 8k takes {flops_ratio:.2f} times the FLOPs of GPT-3's at 2k; the rest would be utilisation",
    )


def _other() -> Iterator[Claim]:
    for topic, claim, why in (
        ("routing", "the routing algorithm is quite simple", "no report gives it; ours is Mixtral's"),
        (
            "data",
            "sequence length raised step by step, batch ramped up over days",
            "no report gives the steps; ours are our choice",
        ),
        ("parallelism", "likely ZeRO stage 1, possibly block-level FSDP", "both fit, see scripts/plan.py"),
        ("context", "32k by fine-tuning the 8k model", "nothing to compute"),
        (
            "vision",
            "a vision encoder joined by cross-attention, fine-tuned with about 2 T more tokens",
            "nothing to compute",
        ),
        ("post-training", "supervised fine-tuning, then RLHF", "nothing to compute"),
    ):
        yield Claim(topic, claim, how=why)
    yield Claim(
        "forecast",
        "text forecasts of April 2022: dense, text-only, 175 to 280 B parameters, about 5 T tokens",
        how="against a mixture of 1.8 T that sees images",
        holds=False,
    )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths that reproduce the reported counts."""

    d_model: int
    d_ff: int
    n_heads: int
    worst_difference: float
    """The largest relative difference to total, active, expert and attention parameters."""


def find_shapes(config: RunConfig, within: float = _CLOSE) -> list[Shape]:
    """Return the shapes with 120 layers and 16 experts that match all reported counts, best for each ratio of widths.

    d_model is a multiple of 128; d_ff of a SwiGLU is 2, 8/3, 3, 3.5 or 4 times d_model, rounded to 128; heads are of
    128 and a multiple of 8, for 8-way tensor parallelism.
    """
    model, found = config.model, dict[float, Shape]()
    vocab_size, L, E, K, Dh = model.vocab_size or 0, model.n_layers, model.n_experts, model.top_k, model.head_dim
    ratios = (2.0, 8 / 3, 3.0, 3.5, 4.0)
    for ratio, d_model in itertools.product(ratios, range(4096, 20_481, 128)):
        d_ff = round(ratio * d_model / 128) * 128
        expert = 3 * L * d_model * d_ff
        for n_heads in range(8, 513, 8):
            attention = L * d_model * Dh * (2 * n_heads + 2)
            rest = attention + vocab_size * d_model + L * E * d_model + (2 * L + 1) * d_model
            pairs = ((E * expert + rest, 1831e9), (K * expert + rest, 280e9), (expert, 111e9), (attention, 55e9))
            worst = max(abs(ours / reported - 1) for ours, reported in pairs)
            if worst <= within and (ratio not in found or worst < found[ratio].worst_difference):
                found[ratio] = Shape(d_model, d_ff, n_heads, worst)
    return [found[ratio] for ratio in ratios if ratio in found]


def write_page(config: RunConfig) -> str:
    """Return the page in Markdown."""
    lines = [
        "# The reports, checked",
        "",
        "Written by `python scripts/check_reports.py`; a test sees that it is current. Every claim that circulated",
        "about GPT-4 from 2020 to 2023 (nothing of it confirmed by OpenAI), beside the value computed here with",
        "`configs/gpt4.yaml`, the difference, and what comes of it. *Consistent* means within 1.5 %, unless the row",
        "says how much more a range or a round number allows; *contradicts* also stands where the reports disagree",
        "among themselves.",
        "",
        "| topic | claim | reported | computed | difference | verdict | how |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in check_claims(config):
        reported, computed = (("" if v is None else format_value(v, c.unit)) for v in (c.reported, c.computed))
        difference = "" if c.difference is None else f"{100 * c.difference:+.1f} %"
        how = f"{c.how}. Assumed: {c.assumption}" if c.assumption else c.how
        if c.tolerance != _CLOSE and c.difference is not None:
            how += f". Taken for equal within {c.tolerance:.0%}"
        lines.append(f"| {c.topic} | {c.claim} | {reported} | {computed} | {difference} | {c.verdict} | {how} |")
    lines += [
        "",
        "## The widths are our derivation",
        "",
        "No report gives d_model or the number of heads. With 120 layers, 16 experts, heads of 128 and one key-value",
        "head, these are the shapes that match total, active, expert and attention parameters within 1.5 %, the best",
        "for each usual ratio of d_ff to d_model (SwiGLU; 8/3 holds as many parameters as 4 with two matrices). The",
        "counts alone fix d_model x d_ff and d_model x heads, not each of them: `configs/gpt4.yaml` takes the row with",
        "8/3.",
        "",
        "| d_model | d_ff | d_ff / d_model | heads of 128 | attention width / d_model | worst difference |",
        "|---|---|---|---|---|---|",
    ]
    for s in find_shapes(config):
        cells = (
            f"{s.d_model:,}",
            f"{s.d_ff:,}",
            f"{s.d_ff / s.d_model:.2f}",
            str(s.n_heads),
            f"{s.n_heads * config.model.head_dim / s.d_model:.2f}",
            f"{s.worst_difference:.2%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
