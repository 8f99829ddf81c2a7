"""Numbers as people write them: units, digits, plurals."""

from __future__ import annotations

import pytest

from moe_gpt.terminal.numbers import FLOPS, TIME, TOKENS, Units, format_digits, plural


@pytest.mark.parametrize(
    ("units", "value", "text"),
    [
        (TOKENS, 0, "0 tokens"),
        (TOKENS, 999, "999 tokens"),
        (TOKENS, 1000, "1 thousand tokens"),
        (TOKENS, 14e12, "14 trillion tokens"),
        (FLOPS, 1.5456e16, "15.46 PFLOP"),
        (TIME, 59, "59 seconds"),
        (TIME, 5400, "1.5 hours"),
    ],
)
def test_values_have_the_largest_unit_of_which_there_is_one(units, value, text):
    """Below the smallest unit it is the smallest."""
    assert units.format(value) == text


def test_a_unit_may_ask_for_more_than_one():
    """With ``least`` of 2, 119 seconds are not yet minutes; signs do not matter."""
    units = Units((1, 60), ("s", "min"), least=2)
    assert [units.fitting(value)[1] for value in (119, 120, -120)] == ["s", "min", "min"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2, "2"), (21792, "21790"), (0.00012, "0.00012"), (1.23456, "1.235"), (-3.5, "-3.5"), (1e7, "10000000")],
)
def test_four_digits_without_an_exponent(value, text):
    """However large or small the number is."""
    assert format_digits(value) == text


@pytest.mark.parametrize(("n", "text"), [(0, "0 steps"), (1, "1 step"), (1000, "1,000 steps")])
def test_one_thing_has_no_plural(n, text):
    """One thing is written without a plural, every other number with it."""
    assert plural(n, "step") == text
