"""A sound file from end to end, and whether it is as long as it claims. libsndfile reads what it finds."""

from __future__ import annotations

import contextlib
import io
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from moe_gpt.errors import InputError

CHANNELS, RATES = (1, 64), (1_000, 384_000)
"""The least and the most that are read."""
_KINDS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST")
"""Those of which a cut is noticed."""
_BLOCK_VALUES = 1 << 20
_MOST_BYTES = 1 << 35
"""A day of two channels at 48 kHz and 24 bits has fewer."""
_UNKNOWN_FRAMES, _UNKNOWN_BYTES = 1 << 62, 0x7FFFF000
"""Claimed, or more, where a program wrote into a pipe and could not know."""
_PAGE, _LAST, _FIRST = 65_307, 4, b"OggS\0\2"
"""Most bytes of a page of Ogg, the flag of the last one, and how the first one begins (RFC 3533)."""
_ORDERS: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"RF64": "little", b"RIFX": "big", b"FORM": "big"}
"""How files of chunks begin, and the order of the bytes in their sizes."""
_MOST_CHUNKS = 10_000
_ALIGNED = 7
"""Bytes that may fill up a W64 file."""
_NIST_COUNT = re.compile(rb"^NIST_1A.*?sample_count -i (\d+)", re.DOTALL)
_MP3_COUNT = re.compile(b"Xing|Info|VBRI")
"""Names in the first frame of an MP3 file that has its length."""
_CHUNK = re.compile(rb"[ -~]{4}.{4}", re.DOTALL)
_PLAIN = ("WAV", "WAVEX", "RF64", "AIFF", "AU")
"""Those of which no more is read than the header claims."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[SoundStream]:
    """Open a file to read it once from end to end.

    Raises:
        InputError: where it is empty, of a kind that is not read, larger than any recording, or no sound.
    """
    size = path.stat().st_size
    if not 0 < size <= _MOST_BYTES:
        raise InputError(f"the file has {size:,} bytes, more than {_MOST_BYTES:,}" if size else "the file is empty")
    try:
        with _OpenEnded(path) as binary, SoundStream(binary) as file:
            if file.format not in _KINDS:
                raise InputError(f"{file.format} is not read, as a cut would not be noticed; convert it to WAV or FLAC")
            check_form(file.channels, file.samplerate)
            yield file
    except soundfile.LibsndfileError as error:
        _check_wave_form(path)
        cause = error.error_string.rstrip(".")
        raise InputError(
            f"it cannot be read as sound ({cause}); it is cut, or to be converted to WAV or FLAC"
        ) from None


def check_form(channels: int, rate: int) -> None:
    """Raise ``InputError`` where a file claims a rate or a number of channels that no recording has."""
    for name, value, (least, most) in (("channels", channels, CHANNELS), ("samples a second", rate, RATES)):
        if not least <= value <= most:
            raise InputError(f"the header says {value:,} {name}; it must be {least:,} to {most:,}")


def _check_wave_form(path: Path) -> None:
    """Name the number that libsndfile refuses without naming it."""
    with open(path, "rb") as file:
        _, is_wave, form = file.read(4096).partition(b"fmt ")
    if is_wave and len(form) >= 12:
        check_form(*struct.unpack_from("<HI", form, 6))


class _OpenEnded(io.BufferedReader):
    """A file; where it is FLAC, its number of samples reads as 0, for unknown, so that all that is there is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.path = path
        self.start = self.read(1024)
        tag = _tag_bytes(self.start)
        self.seek(tag)
        self.head = self.read(256)
        self.count, self.zeros = 0, dict[int, int]()
        if self.head.startswith(b"fLaC"):
            self.count = int.from_bytes(self.head[18:26]) & (1 << 36) - 1
            self.zeros = {tag + 21: 0xF0, **dict.fromkeys(range(tag + 22, tag + 26), 0)}
        self.seek(0)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes."""
        start, n_read = self.tell(), super().readinto(buffer)
        view = memoryview(buffer).cast("B")
        for place, kept in self.zeros.items():
            if start <= place < start + n_read:
                view[place - start] &= kept
        return n_read


def _tag_bytes(start: bytes) -> int:
    """Return how long a tag of ID3v2 is that a file begins with."""
    return 10 + int("".join(f"{byte & 127:07b}" for byte in start[6:10]), 2) if start.startswith(b"ID3") else 0


class SoundStream(soundfile.SoundFile):
    """A sound file that is read once, from end to end."""

    def __init__(self, binary: _OpenEnded) -> None:
        super().__init__(binary)
        self.binary, self.path = binary, binary.path
        self.count, self.behind = 0, 0

    def seekable(self) -> bool:
        """Return False: libsndfile cannot seek in FLAC of unknown length."""
        return False

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield pieces of shape (n_frames, n_channels): first those that the header claims, then what else is there."""
        claimed, most = self._claimed(), max(1, _BLOCK_VALUES // self.channels)
        while True:
            if self.count == claimed and self.format in _PLAIN:
                self.behind = self._bytes_behind()
            left = claimed - self.count if claimed > self.count else most
            block = self._block(min(most, left), must_be=self.count < max(1, claimed))
            if not len(block):
                return
            self.count += len(block)
            yield block

    def _block(self, n_frames: int, must_be: bool) -> NDArray[np.float32]:
        try:
            return self.read(n_frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            if must_be:
                raise
            return np.zeros((0, self.channels), np.float32)  # what follows the samples is none, such as a tag

    def differs(self) -> str:
        """Say how a file that was read differs from its header; empty where it does not.

        Raises:
            InputError: where the header says that there are no samples, although bytes follow.
        """
        if self.format == "OGG" and (told := _told_of_pages(self.path)):
            return told
        if (claimed := self._claimed() or self.count) != self.count:
            return _compared(self.count, claimed, "samples")
        claimed_bytes, there = _sizes(self.path)
        if there < claimed_bytes or there > claimed_bytes + _ALIGNED and self.format == "W64":
            return _compared(there, claimed_bytes, "bytes")
        return self._told_of_bytes_behind() if self.behind else ""

    def _told_of_bytes_behind(self) -> str:
        if not self.count:
            raise InputError(f"the header says 0 samples, but {self.behind:,} bytes follow it")
        return f"only the {self.count:,} samples that the header claims are read; {self.behind:,} bytes follow"

    def _claimed(self) -> int:
        """Return the number of samples that the header claims; 0 where it claims none."""
        if self.format == "FLAC":
            return self.binary.count
        found = _NIST_COUNT.search(self.binary.start)
        frames = int(found[1]) if found else self.frames
        return 0 if frames > _UNKNOWN_FRAMES or self._is_guess() else frames

    def _is_guess(self) -> bool:
        """Return whether libsndfile guesses the number of samples of an MP3 file from its first frame."""
        return self.format == "MP3" and not _MP3_COUNT.search(self.binary.head)

    def _bytes_behind(self) -> int:
        """Return how many bytes follow that are neither a chunk with a name and a size, nor one that fills up."""
        place = self.binary.tell()
        self.binary.seek(place + place % 2)
        head, there = self.binary.read(8), self.path.stat().st_size
        self.binary.seek(place)
        return 0 if _CHUNK.match(head) or there - place < 2 else there - place


def _sizes(path: Path) -> tuple[int, int]:
    """Return how many bytes, of samples mostly, a header claims, 0 for unknown, and how many there are."""
    there = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(24)
        if start.startswith(b".snd"):
            claimed, there = _known(int.from_bytes(start[8:12])), there - int.from_bytes(start[4:8])
        elif start.startswith(b"riff"):
            claimed = int.from_bytes(start[16:], "little")
        else:
            claimed, place = _data_chunk(file, start[:4])
            there -= place
    return claimed, there


def _data_chunk(file: BinaryIO, kind: bytes) -> tuple[int, int]:
    """Return how many bytes of samples a file of chunks claims, and where they begin; zeros where it does not say."""
    place, long = 12, 0
    for _ in range(_MOST_CHUNKS if kind in _ORDERS else 0):
        file.seek(place)
        name, size = file.read(4), int.from_bytes(file.read(4), _ORDERS[kind])
        if name in (b"data", b"SSND"):
            return long or _known(size), place + 8
        if name == b"ds64":
            long = int.from_bytes(file.read(16)[8:], "little")
        place += 8 + size + size % 2
    return 0, 0


def _known(size: int) -> int:
    return size if size < _UNKNOWN_BYTES else 0


def _compared(there: int, claimed: int, unit: str) -> str:
    if there < claimed:
        return f"ends early: {there:,} of {claimed:,} {unit}"
    return f"longer than its header says: {there:,} {unit}, not {claimed:,}"


def _told_of_pages(path: Path) -> str:
    """Say whether the last page of an Ogg file is cut, or not marked as the last one, or a second stream begins."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        page = pages[max(0, pages.rfind(b"OggS", -_PAGE)) :]
        has_second = pages.find(_FIRST, 1) > 0
    if not _is_last(page):
        return "ends early: its last page is missing"
    return "only the first of several streams is read" if has_second else ""


def _is_last(page: bytes) -> bool:
    n_parts = page[26] if len(page) > 26 else 0
    return 27 + n_parts + sum(page[27 : 27 + n_parts]) <= len(page) and bool(page[5] & _LAST)
