"""What the demonstration says: digits and household sentences, and who says it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_gpt.speech.synthesis import Speaker

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twenty"]
_ROOMS = ["kitchen", "bedroom", "bathroom", "garden", "hall", "office"]
_THINGS = ["light", "heater", "fan", "radio", "window", "door", "music", "lamp"]
_DAYS = ["today", "tomorrow", "monday", "sunday"]
HOUSEHOLD = sorted(
    {
        *(f"set a timer for {n} {unit}" for n in _NUMBERS for unit in ("minutes", "hours")),
        *(f"turn {way} the {thing}" for way in ("on", "off") for thing in _THINGS if thing not in ("window", "door")),
        *(
            f"{what} the {thing} in the {room}"
            for what in ("open", "close")
            for thing in ("window", "door")
            for room in _ROOMS
        ),
        *(f"turn on the {thing} in the {room}" for thing in ("light", "heater", "fan") for room in _ROOMS),
        *(f"what is the weather {day}" for day in _DAYS),
        *(f"wake me at {n} {day}" for n in _NUMBERS[3:9] for day in _DAYS),
        *(f"add {n} {what} to my list" for n in _NUMBERS[:6] for what in ("apples", "eggs", "lemons")),
    }
)
_HELD_OUT_SHARE = 5
ACCENTS, NEW_ACCENTS = ("gmw/en", "gmw/en-US", "gmw/en-GB-x-rp"), ("gmw/en-GB-scotland", "gmw/en-029")
_UNLIKE = {"croak", "UniRobot", "anikaRobot", "fast", "Tweaky", "AnxiousAndy"}
_UNSTEADY = {"Alicia", "Demonic", "f2", "f3", "f5", "sandro", "victor", "whisper", "whisperf"}
"""Variants with breath, whose samples espeak-ng 1.52 does not repeat from process to process."""
N_VARIANTS, N_NEW_VARIANTS = 40, 6


class Said(NamedTuple):
    """A sentence and its speaker."""

    text: str
    speaker: Speaker


def is_held_out(text: str) -> bool:
    """Whether a sentence is never said in training: a fifth of all, by a hash of the text."""
    return hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def draw(rng: np.random.Generator, n: int, accents: tuple[str, ...], variants: list[str], held_out: bool) -> list[Said]:
    """Return random sentences, half of them digits and half household, by random speakers.

    Args:
        accents: of the speakers.
        variants: of the speakers; each goes with each accent.
        held_out: draw only sentences that are held out, or only others.
    """
    return list(
        itertools.islice((said for said in _endless(rng, accents, variants) if is_held_out(said.text) is held_out), n)
    )


def _endless(rng: np.random.Generator, accents: tuple[str, ...], variants: list[str]) -> Iterator[Said]:
    while True:
        text = " ".join(rng.choice(DIGITS, rng.integers(2, 6))) if rng.random() < 0.5 else str(rng.choice(HOUSEHOLD))
        yield Said(
            text,
            Speaker(str(rng.choice(accents)), str(rng.choice(variants)), *map(int, rng.integers((140, 25), (210, 75)))),
        )


def split_variants(names: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return variants to train with and others to test with, drawn from those that are like people and steady."""
    usable = rng.permutation([name for name in names if name not in _UNLIKE | _UNSTEADY]).tolist()
    return sorted(usable[:N_VARIANTS]), sorted(usable[N_VARIANTS : N_VARIANTS + N_NEW_VARIANTS])
