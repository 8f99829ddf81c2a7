"""Pictures of coloured shapes with what can be said of them, drawn offline, each from its number alone.

A scene is 64 x 64: one to three shapes in three columns at any height, on a dark ground with noise. Six pairs of colour
and shape, one of each colour, are in no training scene: what a model says of them shows whether it puts together what
it has seen apart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 230),
    "yellow": (230, 210, 50),
    "purple": (160, 60, 200),
    "white": (235, 235, 235),
}
SHAPES = ("ring", "square", "triangle", "star", "cross")
HELD_OUT = tuple(zip(COLOURS, ("ring", "square", "triangle", "star", "cross", "ring"), strict=True))
"""Pairs of colour and shape that are in no training scene."""
SIDE, _COLUMNS = 64, (12, 32, 52)
_NUMBERS = ("one", "two", "three")


class Shape(NamedTuple):
    """A shape of a scene."""

    colour: str
    name: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        """The colour and the shape."""
        return f"{self.colour} {self.name}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene, which its name determines.

    Args:
        name: any text, such as the split and a number.
        fewest: shapes at least.
        has_held_out: it has a pair that no training scene has; else it has none.
    """

    name: str
    fewest: int = 1
    has_held_out: bool = False

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes from left to right; colours and names may repeat, pairs do not."""
        draw = random.Random(self.name)
        columns = sorted(draw.sample(_COLUMNS, draw.randint(self.fewest, len(_COLUMNS))))
        pairs = [(colour, name) for colour in COLOURS for name in SHAPES]
        chosen = draw.sample([pair for pair in pairs if pair not in HELD_OUT], len(columns))
        if self.has_held_out:
            chosen[draw.randrange(len(chosen))] = draw.choice(HELD_OUT)
        return tuple(
            Shape(*pair, x + draw.uniform(-1, 1), draw.uniform(11, SIDE - 11), draw.uniform(7.5, 9.5))
            for pair, x in zip(chosen, columns, strict=True)
        )

    def pixels(self, size: int = SIDE) -> UInt8[Tensor, "3 size size"]:
        """Draw the scene."""
        from PIL import Image, ImageDraw

        draw = random.Random(f"{self.name} drawn")
        image = Image.new("RGB", (SIDE, SIDE), tuple(draw.randrange(60) for _ in range(3)))
        canvas = ImageDraw.Draw(image)
        for shape in self.shapes:
            colour = tuple(max(0, min(255, part + draw.randint(-20, 20))) for part in COLOURS[shape.colour])
            for polygon in _outlines(shape):
                canvas.polygon(polygon, fill=colour)
        noise = np.random.default_rng(draw.getrandbits(64)).normal(0, 6, (SIDE, SIDE, 3))
        pixels = (np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8)
        if size != SIDE:
            pixels = np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _outlines(shape: Shape) -> list[list[tuple[float, float]]]:
    """Return the polygons that fill a shape."""

    def corners(n: int, turn: float, radii: Sequence[float] = (1.0,)) -> list[tuple[float, float]]:
        angles = [turn + 2 * math.pi * k / n for k in range(n)]
        lengths = [shape.radius * radii[k % len(radii)] for k in range(n)]
        return [(shape.x + r * math.sin(a), shape.y - r * math.cos(a)) for a, r in zip(angles, lengths, strict=True)]

    def bar(wide: float, high: float) -> list[tuple[float, float]]:
        w, h = shape.radius * wide, shape.radius * high
        return [
            (shape.x - w, shape.y - h),
            (shape.x + w, shape.y - h),
            (shape.x + w, shape.y + h),
            (shape.x - w, shape.y + h),
        ]

    draw: dict[str, Callable[[], list[list[tuple[float, float]]]]] = {
        "ring": lambda: [[*(outer := corners(24, 0)), outer[0], *reversed(inner := corners(24, 0, (0.5,))), inner[-1]]],
        "square": lambda: [bar(0.9, 0.9)],
        "triangle": lambda: [corners(3, math.pi, (1.1,))],
        "star": lambda: [corners(10, 0, (1.15, 0.45))],
        "cross": lambda: [bar(0.3, 1), bar(1, 0.3)],
    }
    return draw[shape.name]()
