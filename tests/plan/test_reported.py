"""The reports, checked: verdicts follow from the numbers, the page is current, the counts come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_gpt.config.yaml import load_run_config
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.reported import Claim, check_claims, find_shapes, write_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "the-report-checked.md"


@pytest.fixture(scope="module")
def gpt4():
    """The reported shape."""
    return load_run_config("gpt4")


def test_page_is_current(gpt4):
    """docs/the-report-checked.md is what the script writes: run scripts/check_reports.py after a change."""
    assert PAGE.read_text(encoding="utf-8") == write_page(gpt4)


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (Claim("t", "c", "count", 100, 101), "consistent"),
        (Claim("t", "c", "count", 100, 101, assumption="a"), "consistent with a stated assumption"),
        (Claim("t", "c", "count", 100, 102), "contradicts"),
        (Claim("t", "c", "count", 100, 102, tolerance=0.03), "consistent"),
        (Claim("t", "c"), "cannot be known"),
        (Claim("t", "c", holds=True), "consistent"),
        (Claim("t", "c", "count", 100, 100, holds=False), "contradicts"),
    ],
)
def test_verdict_follows_from_the_difference(claim, verdict):
    """1.5 % either way, unless the row allows more, or it is no number."""
    assert claim.verdict == verdict


def test_reported_numbers_come_out(gpt4):
    """The counts of the reports within 1.5 %, compute within 2 %, the parallel layout's weights within 2 %."""
    claims = {claim.claim: claim for claim in check_claims(gpt4)}
    verdicts = {text: claim.verdict for text, claim in claims.items()}
    for text in ("about 111 B parameters in an expert", "about 280 B parameters used for a token", "2.15e25 FLOPs"):
        assert verdicts[text] == "consistent with a stated assumption"
    assert claims["about $63 M at $1 per A100-hour"].computed == pytest.approx(57e6, rel=0.01)
    assert verdicts['"560 TFLOPs" for a token'] == "contradicts"
    assert sum(verdict == "contradicts" for verdict in verdicts.values()) >= 6
    assert all(claim.how for claim in claims.values())


def test_shapes_match_the_counts(gpt4):
    """Ours is among them, and the closed formula is what counting on the meta device gives."""
    shapes = find_shapes(gpt4)
    assert len(shapes) > 1
    (ours,) = [shape for shape in shapes if shape.d_model == gpt4.model.d_model]
    assert (ours.d_ff, ours.n_heads) == (gpt4.model.d_ff, gpt4.model.n_heads)
    counts = count_parameters(gpt4.model)
    pairs = ((counts.total, 1831e9), (counts.active, 280e9), (counts.per_expert, 111e9), (counts.attention, 55e9))
    assert max(abs(a / b - 1) for a, b in pairs) == pytest.approx(ours.worst_difference, rel=1e-6)
