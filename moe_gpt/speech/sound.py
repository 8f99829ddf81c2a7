"""Sound files as samples at 16 kHz: one channel, in -1 to 1, read in pieces so that an hour takes no more memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from moe_gpt.errors import InputError
from moe_gpt.files.durable import read_digest
from moe_gpt.speech.sound_file import SoundStream, opened

RATE = 16_000
"""Samples a second of all that is given to a model."""
Samples = NDArray[np.float32]
_MOST_HOURS = 24
_LEAST_SECONDS = 0.1
_SILENT = 1e-4
"""Peak below which a file has nothing to hear: less than four steps of 16 bits."""
_CANCELLED = 0.1
"""Level of the channels' mean over that of the loudest, below which they cancel each other."""


@dataclasses.dataclass(frozen=True)
class Sound:
    """A sound file that was read once, from end to end, and is sound."""

    path: Path
    rate: int
    """Samples a second in the file."""
    seconds: float
    sha256: str
    """Digest of the file."""
    is_silent: bool
    scale: float
    """Factor that brings the loudest sample to 1, where it is above."""
    channel: int | None
    """The channel that is taken; None for the mean of all."""
    remarks: tuple[str, ...]
    """What the file is not, or not quite, as its header says or a user would expect."""

    def blocks(self) -> Iterator[Samples]:
        """Yield the samples at 16 kHz in pieces of about a minute, each of shape (n_samples,)."""
        resampler = None if self.rate == RATE else soxr.ResampleStream(self.rate, RATE, 1, dtype="float32")
        with opened(self.path) as file:
            for block in file.blocks():
                mono = block.mean(axis=1) if self.channel is None else block[:, self.channel]
                mono = np.ascontiguousarray(mono * np.float32(self.scale))
                yield mono if resampler is None else resampler.resample_chunk(mono).clip(-1, 1)  # edges overshoot
        if resampler is not None:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True).clip(-1, 1)


def open_sound(path: Path) -> Sound:
    """Read a file once to check it and to measure what ``Sound.blocks`` needs.

    The contents decide what the file is, not its name.

    Args:
        path: WAV, RF64, W64, FLAC, Ogg, MP3, AIFF, AU, CAF or NIST.

    Raises:
        InputError: naming the file and the cause.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file" if path.exists() else f"{path} is not there")
    try:
        with opened(path) as file:
            return _survey(path, file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def read_sound(path: str | Path) -> Samples:
    """Return all samples of a file as a model hears them: shape (n_samples,), float32, 16 kHz, one channel, in -1 to 1.

    Raises:
        InputError: where the file is not sound, as for ``open_sound``.
    """
    return np.concatenate(list(open_sound(Path(path)).blocks()))


class _Levels:
    """Sums over the blocks of a file."""

    def __init__(self, n_channels: int) -> None:
        self.peak = 0.0
        self.energy, self.mean_energy = np.zeros(n_channels), 0.0

    def add(self, block: NDArray[np.float32]) -> None:
        """Count a piece of shape (n_frames, n_channels)."""
        if not np.isfinite(block).all():
            raise InputError("it has samples that are infinite or no number")
        self.peak = max(self.peak, float(np.abs(block).max()))
        self.energy += np.square(block, dtype=np.float64).sum(axis=0)
        self.mean_energy += float(np.square(block.mean(axis=1), dtype=np.float64).sum())

    def remarks(self) -> dict[str, bool]:
        """Return what may be said of the file, and whether it is true."""
        loudest = int(self.energy.argmax()) + 1
        return {
            f"its channels cancel each other; channel {loudest} of {len(self.energy)} is taken alone": self.cancels,
            f"its loudest sample is {self.peak:.3g}, above 1; all are scaled down by it": self.peak > 1,
            "it is silent": self.peak < _SILENT,
        }

    @property
    def cancels(self) -> bool:
        """Whether the mean of the channels is much quieter than the loudest of them."""
        return self.mean_energy < _CANCELLED**2 * float(self.energy.max())


def _survey(path: Path, file: SoundStream) -> Sound:
    levels = _Levels(file.channels)
    for block in file.blocks():
        levels.add(block)
        if file.count > _MOST_HOURS * 3600 * file.samplerate:
            raise InputError(f"it is longer than {_MOST_HOURS} hours; cut it into parts")
    of_length = file.differs()
    if file.count < _LEAST_SECONDS * file.samplerate:
        raise InputError(f"it has {file.count:,} samples, less than {_LEAST_SECONDS} seconds")
    return Sound(
        path,
        rate=file.samplerate,
        seconds=file.count / file.samplerate,
        sha256=read_digest(path).sha256,
        is_silent=levels.peak < _SILENT,
        scale=1 / max(1.0, levels.peak),
        channel=int(levels.energy.argmax()) if levels.cancels else None,
        remarks=tuple(text for text, is_so in {of_length: of_length, **levels.remarks()}.items() if is_so),
    )
