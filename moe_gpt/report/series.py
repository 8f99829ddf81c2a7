"""Values over training: made short enough to draw and to print."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Series(NamedTuple):
    """A quantity as training went on."""

    tokens: np.ndarray
    """Tokens seen (n_records,)."""
    values: np.ndarray
    """(n_records, ...)"""

    @property
    def is_there(self) -> bool:
        """Whether there is a value at all."""
        return len(self.tokens) > 0

    def shortened(self, limit: int = 1200) -> Series:
        """Return at most ``limit`` points: means of equal parts, with the last tokens of each."""
        parts = -(-len(self.tokens) // limit)
        if parts <= 1:
            return self
        starts = np.arange(0, len(self.tokens), parts)
        lengths = np.diff([*starts, len(self.tokens)])
        return Series(self.tokens[starts + lengths - 1], np.add.reduceat(self.values, starts) / lengths)

    def smoothed(self, window: int) -> Series:
        """Return the mean of the newest ``window`` values at each place, of fewer at the start."""
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        ends = np.arange(1, len(self.values) + 1)
        starts = np.maximum(ends - window, 0)
        return Series(self.tokens, (sums[ends] - sums[starts]) / (ends - starts))

    def spread(self, limit: int) -> Series:
        """Return at most ``limit`` of the points, evenly spread, the first and the last among them."""
        chosen = spread(len(self.tokens), limit)
        return Series(self.tokens[chosen], self.values[chosen])


def spread(n: int, limit: int) -> list[int]:
    """Return at most ``limit`` indices below ``n``, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, limit))}) if n else []
