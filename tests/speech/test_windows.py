"""Windows are cut in pauses, and together they are the whole sound."""

from __future__ import annotations

import numpy as np
import pytest

from moe_gpt.speech.windows import windows

RATE = 16_000


def speech(rng: np.random.Generator, n_words: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Words of noise with pauses of 0.25 to 0.6 seconds, and where each word lies."""
    parts, places, at = [], [], 0
    for _ in range(n_words):
        word, pause = rng.normal(0, 0.1, rng.integers(3200, 12_000)), np.zeros(rng.integers(4000, 9600))
        places.append((at, at + len(word)))
        parts += [word, pause]
        at += len(word) + len(pause)
    return np.concatenate(parts).astype(np.float32), places


@pytest.mark.parametrize("seed", range(8))
def test_no_word_is_cut_lost_or_doubled(seed):
    """In blocks of any size: every sample once and in order, every word inside one window."""
    rng = np.random.default_rng(seed)
    samples, words = speech(rng, 60)
    blocks = np.split(samples, sorted(rng.integers(0, len(samples), 20)))
    found = list(windows(blocks, 4.0))
    np.testing.assert_array_equal(np.concatenate([window.samples for window in found]), samples)
    starts = [round(window.start * RATE) for window in found]
    assert starts == np.cumsum([0, *[len(window.samples) for window in found]])[:-1].tolist()
    assert max(len(window.samples) for window in found) <= 4 * RATE
    assert all(window.ends_in_pause for window in found)
    assert not [(start, end) for start, end in words if any(start < cut < end for cut in starts)]


def test_sound_without_a_pause_says_so():
    """The cut is then a guess; the last window ends where the sound does."""
    *cut, last = windows([np.random.default_rng(0).normal(0, 0.1, 10 * RATE).astype(np.float32)], 4.0)
    assert cut
    assert not any(window.ends_in_pause for window in cut)
    assert last.ends_in_pause


def test_what_fits_is_one_window():
    """Exactly as long as the model takes, and nothing at all."""
    samples = np.ones(4 * RATE, np.float32)
    [window] = windows([samples], 4.0)
    assert window.start == 0
    assert len(window.samples) == 4 * RATE
    assert list(windows([], 4.0)) == []
