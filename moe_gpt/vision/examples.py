"""Questions on pictures that are made offline, with the right answers: scenes of shapes, and handwritten digits.

An example is what a row of a file is, a prompt with a marker for each picture and a text that answers it; or two.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from moe_gpt.errors import InputError
from moe_gpt.vision.pictured_text import MARKER, Drawable
from moe_gpt.vision.scenes import SIDE, Scene

DRAWING = 1
"""Changes with what is drawn or asked, so that a run does not go on with other pictures than it began with."""
N_TRAINING = 100_000
"""Examples of a pass; the next pass has the same ones."""
_N_TESTS = 200
"""Questions of a task."""
_NUMBERS = ("one", "two", "three")
_CAPTION, _COUNT, _COLOUR, _DIGITS = (
    "The picture shows",
    "The number of shapes is",
    "The colour of the",
    "The digits are",
)


class Example(NamedTuple):
    """Questions on pictures and their answers, one after another."""

    turns: tuple[tuple[str, str], ...]
    """Prompts, with a marker for each picture, and texts that answer them; the last one is scored."""
    pictures: tuple[Drawable, ...]
    by_chance: float | None = None
    """Share of right answers about a random object of the right picture; None where the question is of no object."""


def caption(*names: str, has_held_out: bool = False) -> Example:
    """Ask of scene after scene what is in it, from left to right."""
    scenes = tuple(Scene(name, has_held_out=has_held_out) for name in names)
    said = (", ".join(f"{shape.colour} {shape.name}" for shape in scene.shapes) for scene in scenes)
    return Example(tuple((f"{MARKER}{_CAPTION}", f" {words}.") for words in said), scenes)


def second(name: str) -> Example:
    """Ask what is in each of two scenes."""
    return caption(f"{name} first", f"{name} then")


def count(name: str) -> Example:
    """Ask how many shapes there are."""
    scene = Scene(name)
    return Example(((f"{MARKER}{_COUNT}", f" {_NUMBERS[len(scene.shapes) - 1]}."),), (scene,))


def colour(name: str) -> Example:
    """Ask which colour a shape has, in a scene of two or three kinds of shapes."""
    scenes = (Scene(f"{name} {attempt}", fewest=2) for attempt in itertools.count())
    scene = next(scene for scene in scenes if len({shape.name for shape in scene.shapes}) == len(scene.shapes))
    asked = random.Random(f"{name} asked").choice(scene.shapes)
    chance = sum(shape.colour == asked.colour for shape in scene.shapes) / len(scene.shapes)
    return Example(((f"{MARKER}{_COLOUR} {asked.name}", f" is {asked.colour}."),), (scene,), chance)


@dataclasses.dataclass(frozen=True)
class Digits:
    """One to three handwritten digits in a row, determined by a name.

    Args:
        name: any text.
        is_test: of the last fifth of the data, which training never sees.
    """

    name: str
    is_test: bool = False

    @functools.cached_property
    def chosen(self) -> list[int]:
        """The numbers of the digits in the data."""
        draw, n = random.Random(self.name), len(_digits()[1])
        numbers = range(n * 4 // 5, n) if self.is_test else range(n * 4 // 5)
        return [draw.choice(numbers) for _ in range(draw.randint(1, 3))]

    def pixels(self, size: int = SIDE) -> UInt8[Tensor, "3 size size"]:
        """Draw them, white on black."""
        from PIL import Image

        canvas = Image.new("L", (SIDE, SIDE))
        for column, number in enumerate(self.chosen):
            small = Image.fromarray((_digits()[0][number] * (255 / 16)).round().astype(np.uint8))
            canvas.paste(small.resize((20, 20), Image.Resampling.BILINEAR), (2 + 20 * column, 22))
        grey = np.asarray(canvas.resize((size, size)))
        return torch.from_numpy(grey.copy()).expand(3, -1, -1).contiguous()


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pictures (N, 8, 8) and the digits (N,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("see.sources: digits need scikit-learn; pip install 'moe_gpt[see]'") from None
    found = load_digits()
    return found.images, found.target


def digits(name: str, is_test: bool = False) -> Example:
    """Ask which digits there are."""
    picture = Digits(name, is_test)
    read = "".join(f" {_digits()[1][number]}" for number in picture.chosen)
    return Example(((f"{MARKER}{_DIGITS}", f"{read}."),), (picture,))


_KINDS: dict[str, tuple[Callable[[str], Example], ...]] = {
    "scenes": (second, second, second, colour, colour, count),
    "digits": (digits,),
}
_TASKS: dict[str, dict[str, Callable[[str], Example]]] = {
    "scenes": {
        "caption_seen": caption,
        "caption_held_out": functools.partial(caption, has_held_out=True),
        "count": count,
        "colour_of_shape": colour,
        "second_picture": second,
    },
    "digits": {"digits_seen": digits, "digits": functools.partial(digits, is_test=True)},
}
TASKS = [task for tasks in _TASKS.values() for task in tasks]
"""The names of all tasks."""


def training_example(source: str, number: int) -> Example:
    """Return an example of scenes or digits."""
    kinds = _KINDS[source]
    return kinds[number % len(kinds)](f"{source} {number}")


def test_examples(source: str) -> dict[str, list[Example]]:
    """Return the questions of each task. Those of scenes are on scenes that training never sees."""
    return {task: [ask(f"test {task} {k}") for k in range(_N_TESTS)] for task, ask in _TASKS[source].items()}
