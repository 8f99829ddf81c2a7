"""Cuts long sound into windows that a model takes whole, each cut in a pause, so that no word is lost or said twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from moe_gpt.speech.sound import RATE, Samples

_STEP = RATE // 100
_PAUSE_STEPS = 20
"""Hundredths of a second that are quiet together in a pause."""
_QUIET = 0.1
"""Level of a pause over that of its window."""


class Window(NamedTuple):
    """A piece of sound between two cuts."""

    start: float
    """Seconds from the file's start."""
    samples: Samples
    """Shape (n_samples,), 16 kHz."""
    ends_in_pause: bool
    """False where the window had no pause to be cut in, so that a word may be cut."""

    @property
    def end(self) -> float:
        """Seconds from the file's start."""
        return self.start + len(self.samples) / RATE


def windows(blocks: Iterable[Samples], seconds: float) -> Iterator[Window]:
    """Yield consecutive windows, together all samples of the blocks, none longer than ``seconds``.

    A window ends in the middle of the quietest fifth of a second of its second half.
    """
    length, start, rest = int(seconds * RATE), 0, np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate((rest, block))
        while len(rest) > length:
            cut, is_pause = _quietest(rest[:length])
            yield Window(start / RATE, rest[:cut], is_pause)
            start, rest = start + cut, rest[cut:]
    if len(rest):
        yield Window(start / RATE, rest, True)


def _quietest(samples: Samples) -> tuple[int, bool]:
    """Return the middle of the quietest moment of the second half, and whether it is a pause."""
    steps = np.square(samples[: len(samples) // _STEP * _STEP].reshape(-1, _STEP)).mean(axis=1, dtype=np.float64)
    width = min(_PAUSE_STEPS, max(1, len(steps) // 4))
    levels = np.convolve(steps, np.full(width, 1 / width), "valid")
    first = len(levels) // 2
    quietest = len(levels) - 1 - int(levels[first:][::-1].argmin())  # the last one of equals
    return (quietest + width // 2) * _STEP, bool(levels[quietest] <= _QUIET**2 * steps.mean())
