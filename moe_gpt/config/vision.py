"""Settings of the stage that shows pictures to a finished text model (``moe-gpt finetune``, section see)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.section import Count, Flag, Positive, Problem, Section, one_of, unless

BASELINES = ("shuffled", "blind", "random_object")
"""In the scores of this stage: shares of answers that are right without seeing (docs/see-and-hear.md)."""
_PIXELS, _WIDTH, _SIDE = 8, 16, 64
"""Of the small encoder: pixels of a row of features, what its width is a multiple of, and the side of pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureSourceConfig(Section):
    """One source of pictures with text: exactly one of builtin and files."""

    builtin: Literal["scenes", "digits"] | None = None
    """Pictures that are made offline: coloured shapes with captions and counts; or scikit-learn's handwritten digits,
    which are read out (needs the package scikit-learn)."""
    files: str | tuple[str, ...] | None = None
    """Paths or globs of .jsonl files with pictures and texts in each line (docs/see-and-hear.md)."""

    def problems(self) -> Iterator[Problem]:
        """Yield keys that exclude each other."""
        yield from one_of(self, "builtin", "files", needed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeeConfig(Section):
    """Pictures for a finished text model, which stays as it is. A step has batch_tokens / seq_len rows."""

    sources: tuple[PictureSourceConfig, ...]
    """The pictures and their texts; each row is visited once in a pass."""
    size: Count | None = None
    """Side in pixels of the square that each picture is fitted into, its shape kept; null is 64, or what the processor
    of an encoder's folder says."""
    encoder: str = "small"
    """small: four convolutions and a transformer block, which learn with the rest; or the folder of a vision model of
    transformers, such as SigLIP or CLIP, which stays as it is."""
    width: Count = 96
    """Width of the small encoder's features."""
    resampled_rows: Count | None = None
    """Rows of features of a picture after a resampler (arXiv 2204.14198); null keeps those of the encoder."""
    every: Count = 1
    """There is cross-attention before the blocks 0, every, 2 every, and so on."""
    gate_lr_scale: Positive = 10.0
    """The gates of cross-attention learn at optimizer.lr times this; they begin closed."""
    blind: Flag = False
    """Show grey pictures in place of all, in training and scores: what a model learns from the texts alone."""
    on_too_long: Literal["error", "drop"] = "error"
    """What happens to rows of files that are longer than seq_len: an error, or they are left out and counted."""

    @property
    def side(self) -> int:
        """The side of pictures, in a run that is set up."""
        return self.size or _SIDE

    def problems(self) -> Iterator[Problem]:
        """Yield sizes that the small encoder cannot have."""
        is_small = self.encoder == "small"
        text = f"size must be a multiple of {_PIXELS} for the small encoder, got {self.size}"
        yield from unless(not is_small or self.side % _PIXELS == 0, text, "size")
        text = f"width must be a multiple of {_WIDTH}, got {self.width}"
        yield from unless(not is_small or self.width % _WIDTH == 0, text, "width")
