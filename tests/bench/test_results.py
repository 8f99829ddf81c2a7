"""Results in a table: units by their names, Python's formats, and ratios to the first."""

from __future__ import annotations

import pytest

from moe_gpt.bench.results import fill, tabulate

FAST = {"name": "a", "speed": 2000.4, "memory": 1.56e9, "quartiles": [1, 2]}
SLOW = {"name": "b", "speed": 1000.0, "memory": 2e9, "quartiles": [3, 4]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{speed:count}", "2,000"),
        ("{memory:bytes}", "1.56 GB"),
        ("{speed:.2f} x", "2000.40 x"),
        ("{quartiles[0]:count} to {quartiles[1]:count}", "1 to 2"),
        ("{name}", "a"),
    ],
)
def test_texts_are_filled_in(text, shown):
    """With the unit after the colon, or as Python does it."""
    assert fill(text, FAST) == shown


def test_unknown_key_is_an_error():
    """A column of another name is no empty column."""
    with pytest.raises(KeyError, match="sped"):
        fill("{sped:count}", FAST)


def test_table_has_the_first_over_each():
    """The ratio is 1 in the first line; without a key there is none."""
    lines = tabulate([FAST, SLOW], {"": "{name}", "first is": "{ratio:.2f} x"}, first_over="speed").splitlines()
    assert [line.split() for line in lines] == [["first", "is"], ["a", "1.00", "x"], ["b", "2.00", "x"]]
    with pytest.raises(KeyError, match="ratio"):
        tabulate([FAST], {"first is": "{ratio}"})
