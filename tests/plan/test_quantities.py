"""Quantities: shown with a unit, sent in base units, explained."""

from __future__ import annotations

import json
import math

import pytest

from moe_gpt.errors import InputError
from moe_gpt.plan.quantities import PlanSection, Quantity, explain, to_json
from moe_gpt.terminal.numbers import format_value

SECTIONS = [
    PlanSection("memory", "Memory", [Quantity("total", 30.5e9, "bytes", "All", "2 N / 120", "ZeRO, table 1")]),
    PlanSection("parameters", "Parameters", [Quantity("total", 1.8326e12, "parameters", "All", "counted", "counted")]),
]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1.8326e12, "parameters", "1.833 trillion"),
        (111e9, "parameters", "111 billion"),
        (512, "parameters", "512"),
        (8192, "tokens", "8,192"),
        (2.175e25, "FLOPs", "21.75 YFLOP"),
        (30.53e9, "bytes", "30.53 GB"),
        (61_440, "bytes/token", "61.44 kB/token"),
        (95 * 86_400.0, "seconds", "95 days"),
        (90.0, "seconds", "90 s"),
        (0.0042, "seconds", "4.2 ms"),
        (2e-6, "seconds", "2 us"),
        (57e6, "dollars", "$57 million"),
        (12.5, "dollars", "$12.50"),
        (0.00061, "dollars", "$0.00061"),
        (0.34, "fraction", "34 %"),
        (25_000, "GPUs", "25,000"),
        (True, "text", "yes"),
        ("compute", "text", "compute"),
        (math.inf, "seconds", "unbounded"),
        (math.nan, "seconds", "unknown"),
        (0, "bytes", "0 B"),
    ],
)
def test_values_as_people_write_them(value, unit, shown):
    """Three or four digits, never more than are known, and the unit."""
    assert format_value(value, unit) == shown


def test_json_is_in_base_units():
    """Stable keys, plain numbers; what is not finite is null."""
    sections = [*SECTIONS, PlanSection("x", "X", [Quantity("y", math.inf, "seconds", "", "", "")])]
    assert to_json(sections) == {"memory": {"total": 30.5e9}, "parameters": {"total": 1.8326e12}, "x": {"y": None}}
    json.dumps(to_json(sections), allow_nan=False)


def test_explanations_have_formula_and_source():
    """A name finds every number of that name, a full name one; an unknown one is refused with its neighbours."""
    assert explain(SECTIONS, "total").count("formula:") == 2
    text = explain(SECTIONS, "memory.total")
    assert "30.5 GB" in text
    assert "2 N / 120" in text
    assert "ZeRO, table 1" in text
    with pytest.raises(InputError, match="no 'totl' in the plan; nearest: .*total"):
        explain(SECTIONS, "totl")
