"""Buckets of positions."""

from __future__ import annotations

import pytest

from moe_gpt.measure.positions import position_buckets


@pytest.mark.parametrize(
    ("length", "buckets"),
    [
        (1, [(0, 1)]),
        (64, [(0, 64)]),
        (80, [(0, 64), (64, 80)]),
        (256, [(0, 64), (64, 128), (128, 256)]),
        (300, [(0, 64), (64, 128), (128, 256), (256, 300)]),
    ],
)
def test_buckets_double_and_end_with_the_sequence(length, buckets):
    """They start at 0, 64, 128, 256 and so on, leave out no position, and none of them is empty."""
    assert position_buckets(length) == buckets
