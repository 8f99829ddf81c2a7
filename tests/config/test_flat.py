"""Settings as dotted keys."""

from __future__ import annotations

import pytest

from moe_gpt.config.flat import flatten


@pytest.mark.parametrize(
    ("value", "flat"),
    [
        ({"a": {"b": 1, "c": [2, {"d": None}]}, "e": "x"}, {"a.b": 1, "a.c.0": 2, "a.c.1.d": None, "e": "x"}),
        ({"a": (1, 2)}, {"a.0": 1, "a.1": 2}),
        ({"a": [], "b": {}}, {"a": [], "b": {}}),
        ({}, {}),
    ],
)
def test_sections_and_lists_become_dotted_keys(value, flat):
    """Entries of lists have their index; empty lists and sections are values; nothing gives nothing."""
    assert flatten(value) == flat
    assert list(flatten(value)) == list(flat)
