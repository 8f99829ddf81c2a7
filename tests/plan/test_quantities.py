"""Quantities: shown with a unit, sent in base units, explained."""

from __future__ import annotations

import json
import math
import re

import pytest
from pydantic import ValidationError

from moe_gpt.errors import InputError
from moe_gpt.plan.hardware import GPUS, Parallelism
from moe_gpt.plan.options import PlanOptions
from moe_gpt.plan.quantities import (
    Catalogue,
    Member,
    PlanSection,
    Quantity,
    catalogue,
    explain,
    plan_section,
    to_json,
)
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
        (18_322.6, "PF-days", "18,320 PF-days"),
        (0.25, "PF-days", "0.25 PF-days"),
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


@pytest.mark.parametrize("name", [*catalogue().sections["compute"].quantities, "stage_3_flops", "memory.total"])
def test_numbers_are_explained_without_a_plan(name):
    """From quantities.yaml: formula and source, no value, and brackets for what a plan would say."""
    text = explain([], name)
    assert "formula: " in text
    assert "source: " in text
    assert not re.search("[{}]|=", text.splitlines()[0])
    assert "{" not in text


def test_names_in_brackets_say_what_a_plan_would():
    """A GPU that is not known is called "gpu name"; papers are known."""
    text = explain([], "compute.gpu_flops") + explain([], "forward_attention_scores")
    assert "Peak of one [gpu name]" in text
    assert "[context] positions" in text
    assert "PaLM, arXiv 2204.02311" in text


def test_numbers_that_a_plan_lacks_are_explained_all_the_same():
    """Without a value; a name that is nowhere is refused with the nearest."""
    assert "arXiv 2204.02311" in explain(SECTIONS, "mfu_from_duration.mfu")
    with pytest.raises(InputError, match=r"no 'params' in the plan; nearest: .*parameters"):
        explain([], "params")


@pytest.mark.parametrize(("n", "title"), [(1, "Failures on 1 working GPU"), (1200, "Failures on 1,200 working GPUs")])
def test_one_is_singular(n, title):
    """And several are plural."""
    options = PlanOptions(gpu=GPUS["h100"], layout=Parallelism(n))
    assert plan_section("failures", {}, {"not_counted": False, "never_ends": False}, options=options).title == title


def test_section_has_the_words_of_the_file():
    """Each value gets its unit, label, formula and source; braces are filled in; a family has words for each member."""
    words = {"options": PlanOptions(gpu=GPUS["h100"], layout=Parallelism(121, 8, 15)), "context": 4096}
    values = {
        "forward_attention_scores": 5,
        "stage_1_flops": Member(7, {"index": 1, "tokens": "12 billion", "seq_len": 2048}),
    }
    section = plan_section(
        "compute", values, {"at_most": False, "idle": False, "spares": True, "of_cpu": False}, **words
    )
    assert section.title == "Compute, time and cost on 121 h100"
    scores, stage = section.quantities
    assert (scores.value, scores.unit) == (5, "FLOPs/token")
    assert "4,096 positions" in scores.label
    assert "PaLM, arXiv 2204.02311" in scores.source
    assert (stage.name, stage.value) == ("stage_1_flops", 7)
    assert "Stage 1: 12 billion tokens at 2,048 positions" in stage.label
    assert "121 GPUs = 1 x 120 + 1" in section.notes[0]
    assert len(section.notes) == 3


GOOD = {"papers": {}, "sections": {"a": {"title": "A", "quantities": {"x": ["bytes", "X", "y + z", "paper"]}}}}


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (["furlongs", "X", "y + z", "paper"], "sections.a.quantities.x.0"),
        (["bytes", "X", "y + z"], "sections.a.quantities.x.3"),
        (["bytes", "X", 3, "paper"], "sections.a.quantities.x.2"),
        (["bytes", "X", "y", "z", "paper"], "sections.a.quantities.x"),
    ],
)
def test_malformed_row_is_refused(row, place):
    """An unknown unit, a missing column, a number where words belong: the error names the place."""
    assert Catalogue.model_validate(GOOD)
    section = GOOD["sections"]["a"] | {"quantities": {"x": row}}
    with pytest.raises(ValidationError) as error:
        Catalogue.model_validate(GOOD | {"sections": {"a": section}})
    assert ".".join(map(str, error.value.errors()[0]["loc"])).startswith(place)


def test_unknown_key_of_the_file_is_refused():
    """A note under a key of another name would never be read."""
    with pytest.raises(ValidationError, match="sections.a.remarks"):
        Catalogue.model_validate(GOOD | {"sections": {"a": GOOD["sections"]["a"] | {"remarks": {}}}})
