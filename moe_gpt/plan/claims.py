"""What was publicly reported about GPT-4, each claim beside the value computed here: ``docs/the-report-checked.md``.

The claims are in ``claims.yaml``, with an expression for each over the plan of ``configs/gpt4.yaml``, whose widths are
our derivation. jinja2 evaluates the expressions and writes the page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_gpt.config import RunConfig
from moe_gpt.config.section import Flag, Positive, Problem, Section, Share
from moe_gpt.plan.answer import TEMPLATES
from moe_gpt.plan.data_files import read_data
from moe_gpt.plan.hardware import GPUS, Parallelism
from moe_gpt.plan.options import PlanOptions
from moe_gpt.plan.plan import plan_run
from moe_gpt.plan.serving import expected_experts_touched
from moe_gpt.terminal.numbers import Unit, format_value

_CLOSE = 0.015
"""Difference up to which a claim that says a number exactly is called consistent; "about" allows what its row says."""

CLAIMED = PlanOptions(
    gpu=GPUS["a100-80gb"],
    layout=Parallelism(25_000, tensor=8, pipeline=15),
    serving=Parallelism(128, tensor=8, pipeline=16),
    mfu=0.34,
    price=1.0,
    context=8192,
    duration_seconds=95 * 86_400.0,
    batch=4096,
    acceptance=0.8,
    gamma=6,
)
"""The cluster that the reports describe; claims.yaml computes with its plan."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim(Section):
    """A reported claim, and how it is checked: an entry of claims.yaml, which says what the fields mean."""

    topic: str
    claim: str
    how: str
    unit: Unit = "text"
    reported: Positive | None = None
    computed: str | float | None = None
    assumption: str = ""
    tolerance: Share = _CLOSE
    holds: Flag | str | None = None

    def problems(self) -> Iterator[Problem]:
        """Yield that a number is missing, or has no unit."""
        if (self.reported is None) != (self.computed is None):
            yield Problem(("reported", "computed"), "reported and computed must be given together, or neither")
        if self.reported is not None and self.unit == "text":
            yield Problem(("unit",), "unit is required beside a number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ClaimsFile(Section):
    claims: tuple[Claim, ...]
    page: str
    """The page, as a jinja2 template."""


@dataclasses.dataclass(frozen=True)
class CheckedClaim:
    """A claim and what was computed for it."""

    claim: Claim
    computed: float | None
    how: str
    """With its numbers filled in."""
    holds: bool | None
    """Of a statement that no difference decides, whether it is true."""

    @property
    def difference(self) -> float | None:
        """Computed over reported, minus 1."""
        if self.claim.reported is None or self.computed is None:
            return None
        return self.computed / self.claim.reported - 1

    @property
    def verdict(self) -> str:
        """What comes of it: of a number by the difference alone, of a statement by whether it holds."""
        holds = self.holds
        if holds is None and self.difference is not None:
            holds = abs(self.difference) <= self.claim.tolerance
        if holds is None:
            return "cannot be known"
        if not holds:
            return "contradicts"
        return "consistent with a stated assumption" if self.claim.assumption else "consistent"

    def cells(self) -> list[str]:
        """Return the row of the page."""
        claim, difference, how = self.claim, "", self.how
        reported, computed = (
            "" if value is None else format_value(value, claim.unit) for value in (claim.reported, self.computed)
        )
        if claim.assumption:
            how += f". Assumed: {claim.assumption}"
        if self.difference is not None:
            difference = f"{100 * self.difference:+.1f} %"
            how += "" if claim.tolerance == _CLOSE else f". A difference of {claim.tolerance:.0%} is allowed"
        return [claim.topic, claim.claim, reported, computed, difference, self.verdict, how]


def read_claims(content: Any = None) -> _ClaimsFile:
    """Return the content of claims.yaml, or of something like it.

    Raises:
        ConfigError: naming every entry and key that is missing, unknown or of the wrong kind.
    """
    return _ClaimsFile.from_mapping(read_data("claims.yaml") if content is None else content)


def words_of(config: RunConfig) -> dict[str, Any]:
    """Return what the expressions of claims.yaml may name."""
    sections = {section.name: section.values for section in plan_run(config, CLAIMED)}
    named = {"model": config.model, "schedule": config.schedule, "layout": CLAIMED.layout}
    return {**sections, **named, "touched": expected_experts_touched}


def check_claim(claim: Claim, words: Mapping[str, Any]) -> CheckedClaim:
    """Compute a claim.

    Raises:
        jinja2.TemplateError: where an expression is malformed, or names what there is not.
    """
    computed, holds = (_evaluate(value, words) for value in (claim.computed, claim.holds))
    how = TEMPLATES.from_string(claim.how).render(words)
    return CheckedClaim(
        claim, None if computed is None else float(computed), how, None if holds is None else bool(holds)
    )


def _evaluate(value: Any, words: Mapping[str, Any]) -> Any:
    if not isinstance(value, str):
        return value
    return TEMPLATES.compile_expression(value, undefined_to_none=False)(words)


def check_claims(config: RunConfig) -> list[CheckedClaim]:
    """Return every claim of the reports, checked with the shape and schedule of ``configs/gpt4.yaml``."""
    words = words_of(config)
    return [check_claim(claim, words) for claim in read_claims().claims]


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
    model, found = config.model, []
    L, E, K, Dh = model.n_layers, model.n_experts, model.top_k, model.head_dim
    d_model, n_heads = np.arange(4096, 20_481, 128)[:, None], np.arange(8, 513, 8)
    for ratio in (2.0, 8 / 3, 3.0, 3.5, 4.0):
        d_ff = 128 * np.round(ratio * d_model / 128).astype(int)
        expert, attention = 3 * L * d_model * d_ff, L * d_model * Dh * (2 * n_heads + 2)
        rest = attention + ((model.vocab_size or 0) + L * E + 2 * L + 1) * d_model
        pairs = ((E * expert + rest, 1831e9), (K * expert + rest, 280e9), (expert, 111e9), (attention, 55e9))
        worst = np.maximum.reduce(np.broadcast_arrays(*(abs(ours / reported - 1) for ours, reported in pairs)))
        row, column = np.unravel_index(worst.argmin(), worst.shape)
        if worst[row, column] <= within:
            widths = (int(d_model[row, 0]), int(d_ff[row, 0]), int(n_heads[column]))
            found.append(Shape(*widths, worst_difference=float(worst[row, column])))
    return found


def write_page(config: RunConfig) -> str:
    """Return the page in Markdown."""
    template = TEMPLATES.from_string(read_claims().page)
    return template.render(claims=check_claims(config), shapes=find_shapes(config), model=config.model)
