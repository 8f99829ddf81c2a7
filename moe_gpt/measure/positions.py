"""Places in a sequence, in buckets that double: with context, loss falls about as much over each of them."""

from __future__ import annotations

import itertools

_FIRST = 64


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Return the buckets [start, end) of a sequence's positions: 0 to 63, 64 to 127, 128 to 255 and so on.

    Args:
        length: positions of the sequence; the last bucket ends there.
    """
    doublings = itertools.takewhile(lambda edge: edge < length, (_FIRST << i for i in itertools.count()))
    return list(itertools.pairwise([0, *doublings, length]))
