"""The reports, checked: verdicts follow from the numbers, the page is current, the counts come out."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import ConfigError
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.claims import Claim, check_claim, check_claims, find_shapes, read_claims, write_page
from moe_gpt.plan.data_files import read_data

PAGE = Path(__file__).resolve().parents[2] / "docs" / "the-report-checked.md"


@pytest.fixture(scope="module")
def gpt4():
    """The reported shape."""
    return load_run_config("gpt4")


def test_page_is_current(gpt4):
    """docs/the-report-checked.md is what the script writes: run scripts/check_reports.py after a change."""
    assert PAGE.read_text(encoding="utf-8") == write_page(gpt4)


def claim(**fields: object) -> Claim:
    """Return a claim of 100, computed as 101, with other fields."""
    numbers = {"unit": "count", "reported": 100, "computed": "a.b + 1"} if "reported" not in fields else {}
    return Claim(**({"topic": "t", "claim": "c", "how": "{{ a.b | spec(',') }} + 1"} | numbers | fields))


WORDS = {"a": {"b": 100}}
NO_NUMBER = {"reported": None, "computed": None}


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({}, "consistent"),
        ({"assumption": "a"}, "consistent with a stated assumption"),
        ({"computed": "a.b * 1.02"}, "contradicts"),
        ({"computed": "a.b * 1.02", "tolerance": 0.03}, "consistent"),
        ({"computed": "a.b * 0.98"}, "contradicts"),
        (NO_NUMBER, "cannot be known"),
        ({**NO_NUMBER, "holds": True}, "consistent"),
        ({"holds": False}, "contradicts"),
        ({"holds": "a.b > 50", "computed": "200"}, "consistent"),
        ({"holds": "a.b > 100"}, "contradicts"),
    ],
)
def test_verdict_follows_from_the_difference(fields, verdict):
    """1.5 % either way, unless the row allows more, or a statement is no number."""
    assert check_claim(claim(**fields), WORDS).verdict == verdict


def test_claim_is_computed_from_the_plan():
    """The expression and the text both see the plan's numbers; the row has all of it."""
    checked = check_claim(claim(assumption="d", tolerance=0.2), {"a": {"b": 1100}})
    assert (checked.computed, checked.how) == (1101, "1,100 + 1")
    assert checked.difference == pytest.approx(10.01)
    how = "1,100 + 1. Assumed: d. A difference of 20% is allowed"
    assert checked.cells() == ["t", "c", "100", "1,101", "+1001.0 %", "contradicts", how]


@pytest.mark.parametrize("fields", [{"computed": "a.c"}, {"computed": "a.b +"}, {"holds": "d.e"}, {"how": "{{ a.c }}"}])
def test_expression_that_means_nothing_is_an_error(fields):
    """A name that the plan lacks, or half an expression, never becomes an empty cell."""
    with pytest.raises(jinja2.TemplateError):
        check_claim(claim(**fields), WORDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerence": 0.1}, "claims.0.tolerence is not a known key; did you mean tolerance?"),
        ({"tolerance": 15}, "claims.0.tolerance must be a number above 0 and below 1, got 15"),
        ({"unit": "furlongs"}, "claims.0.unit must be one of parameters, "),
        ({"reported": "about 5"}, "claims.0.reported must be a number above 0 or null, got 'about 5'"),
        ({"computed": None}, "claims.0.reported and computed must be given together"),
        ({"unit": "text"}, "claims.0.unit is required beside a number"),
        ({"claim": None}, "claims.0.claim must be text"),
    ],
)
def test_malformed_claim_is_refused(changes, message):
    """The error names the entry, the key and what would be right; claims.yaml itself has no such entry."""
    content = read_data("claims.yaml")
    assert read_claims(content)
    with pytest.raises(ConfigError) as error:
        read_claims({**content, "claims": [content["claims"][0] | changes, *content["claims"][1:]]})
    assert str(error.value).startswith(message)


def test_reported_numbers_come_out(gpt4):
    """The counts of the reports within 1.5 %, compute within 2 %, the parallel layout's weights within 2 %."""
    claims = {checked.claim.claim: checked for checked in check_claims(gpt4)}
    verdicts = {text: checked.verdict for text, checked in claims.items()}
    for text in ("about 111 B parameters in an expert", "about 280 B parameters used for a token", "2.15e25 FLOPs"):
        assert verdicts[text] == "consistent with a stated assumption"
    assert claims["about $63 M at $1 per A100-hour"].computed == pytest.approx(57e6, rel=0.01)
    assert verdicts['"560 TFLOPs" for a token'] == "contradicts"
    assert sum(verdict == "contradicts" for verdict in verdicts.values()) >= 6
    assert claims["60 M tokens are 7.5 M tokens for each expert"].computed == 7_500_000
    assert all(checked.how for checked in claims.values())


def test_shapes_match_the_counts(gpt4):
    """Ours is among them, and the closed formula is what counting on the meta device gives."""
    shapes = find_shapes(gpt4)
    assert len(shapes) > 1
    (ours,) = [shape for shape in shapes if shape.d_model == gpt4.model.d_model]
    assert (ours.d_ff, ours.n_heads) == (gpt4.model.d_ff, gpt4.model.n_heads)
    counts = count_parameters(gpt4.model)
    pairs = ((counts.total, 1831e9), (counts.active, 280e9), (counts.per_expert, 111e9), (counts.attention, 55e9))
    assert max(abs(a / b - 1) for a, b in pairs) == pytest.approx(ours.worst_difference, rel=1e-6)
