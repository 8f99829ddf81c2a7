"""What the header of a WAV file claims, read chunk by chunk, to be compared with what is there.

libsndfile reads the samples. It takes what it finds without a word where header and file differ.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moe_gpt.errors import InputError

_MOST_CHUNKS = 1000
_UNKNOWN_BYTES = 0x7FFFF000
"""Programs that write into a pipe claim this many bytes or more."""
_UNCOMPRESSED = (1, 3, 6, 7, 0xFFFE)
"""Formats with so many bytes for each sample: whole numbers, floats, A-law, mu-law, and their extensible form."""
CHANNELS, RATES = (1, 64), (1_000, 384_000)
"""The least and the most that are read."""


class WaveHeader(NamedTuple):
    """Facts of a RIFF or RF64 file."""

    channels: int
    rate: int
    """Frames a second."""
    frame_bytes: int
    claimed_bytes: int
    """Of samples, by the header."""
    present_bytes: int
    """Of samples at most, from the start of the data to the file's end."""
    has_chunk_after: bool
    """Whether what follows the claimed samples looks like another chunk."""
    unit: str = "samples"
    """What a frame is: a block of many samples where they are compressed."""

    def differs(self) -> str:
        """Say how the number of samples differs from what the header says; empty where it does not.

        Raises:
            InputError: where the header says that there are none, although bytes follow.
        """
        unit = self.unit
        claimed, present = (count // self.frame_bytes for count in (self.claimed_bytes, self.present_bytes))
        if claimed == 0 < present:
            raise InputError(f"the header says 0 samples, but {self.present_bytes:,} bytes follow it")
        if present < claimed and self.claimed_bytes < _UNKNOWN_BYTES:
            return f"ends early: {present:,} of {claimed:,} {unit}"
        if present > claimed and not self.has_chunk_after:
            return f"only the {claimed:,} {unit} that the header claims are read; some {present:,} are there"
        return ""


def read_wave_header(path: Path) -> WaveHeader | None:
    """Return what a WAV file's header claims; None for another kind of file, or one without format or samples.

    Raises:
        InputError: where the rate or the number of channels is impossible.
    """
    with open(path, "rb") as file:
        start = file.read(12)
        if start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE":
            return None
        return _read_chunks(file, path.stat().st_size)


def check_form(channels: int, rate: int) -> None:
    """Raise ``InputError`` where a file claims a rate or a number of channels that no recording has."""
    for name, value, (least, most) in (("channels", channels, CHANNELS), ("samples a second", rate, RATES)):
        if not least <= value <= most:
            raise InputError(f"the header says {value:,} {name}; it must be {least:,} to {most:,}")


def _read_chunks(file: BinaryIO, file_bytes: int) -> WaveHeader | None:
    chunks: dict[bytes, bytes] = {}
    for _ in range(_MOST_CHUNKS):
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
        start = file.tell()
        if name in (b"", b"data"):
            return _with_data(file, chunks, size, file_bytes) if name and len(chunks.get(b"fmt ", b"")) >= 14 else None
        chunks[name] = file.read(min(size, 40))
        file.seek(start + size + size % 2)
    return None


def _with_data(file: BinaryIO, chunks: dict[bytes, bytes], size: int, file_bytes: int) -> WaveHeader:
    """Return the facts of a file that stands at its samples."""
    code, channels, rate, _, frame_bytes = struct.unpack_from("<HHIIH", chunks[b"fmt "])
    check_form(channels, rate)
    is_long = size == 0xFFFFFFFF and len(chunks.get(b"ds64", b"")) >= 16
    claimed = int.from_bytes(chunks[b"ds64"][8:16], "little") if is_long else size
    start = file.tell()
    file.seek(start + claimed + claimed % 2)
    head = file.read(8)
    has_chunk = len(head) == 8 and head[:4].isascii() and head[:4].decode("ascii").isprintable()
    unit = "samples" if code in _UNCOMPRESSED else "compressed blocks"
    return WaveHeader(channels, rate, max(1, frame_bytes), claimed, file_bytes - start, has_chunk, unit)
