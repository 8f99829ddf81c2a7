"""Opening files that may be compressed, as a stream of bytes that never needs the whole file in memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib.util
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_LONGEST_ZSTD_WINDOW = 1 << 27
_ZSTD_INPUT = 1 << 10  # an input of 1 KiB gives at most 32 MiB


class UnreadableFileError(Exception):
    """What is wrong with a file, and what would be right; without the file's name."""


def is_compressed(path: Path) -> bool:
    """Whether the file's name says that it is compressed."""
    return path.suffix.lower() in _OPENERS


def format_suffix(path: Path) -> str:
    """Return the suffix that names the format, without that of a compression."""
    return (path.with_suffix("") if is_compressed(path) else path).suffix.lower()


class _Chunks(io.RawIOBase):
    """A file of chunks of bytes, which is read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        """It is for reading only."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the next chunk that is not empty does."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        n_bytes = min(len(buffer), len(self._rest))
        buffer[:n_bytes], self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return n_bytes


def _open_zstandard(path: Path) -> BinaryIO:
    if not importlib.util.find_spec("zstandard"):
        raise UnreadableFileError("a .zst file needs the package zstandard; run pip install zstandard")
    return io.BufferedReader(_Chunks(_unpack_zstandard(path)))  # type: ignore[return-value]


def _unpack_zstandard(path: Path) -> Iterator[bytes]:
    """Yield what the frames hold; the package's own reader would take a file that is cut off for a whole one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_LONGEST_ZSTD_WINDOW)
    frame, is_inside = decompressor.decompressobj(), False
    with open(path, "rb") as file:
        while block := file.read(_ZSTD_INPUT):
            while block:
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    remedy = "compress it again without --long, or unpack it with zstd -d --long=31"
                    reason = remedy if "memory" in str(error) else "the file is damaged"
                    raise UnreadableFileError(f"{error}; {reason}") from None
                is_inside, block = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = decompressor.decompressobj()
    if is_inside:
        raise UnreadableFileError("the compressed file ended before the end of its last frame; copy it again")


def _unpack(path: Path, make: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """Yield what the streams of a .bz2 or .xz file hold; Python's own readers pass over what is no stream."""
    decompressor, is_inside = make(), False
    with open(path, "rb") as file:
        while block := file.read(1 << 16):
            block = block if is_inside else block.lstrip(padding)
            while block or not (decompressor.needs_input or decompressor.eof):
                yield decompressor.decompress(block, 1 << 20)
                block, is_inside = b"", True
                if decompressor.eof:
                    block, decompressor, is_inside = decompressor.unused_data.lstrip(padding), make(), False
    if is_inside:
        raise UnreadableFileError("the compressed file ended before the end of its last stream; copy it again")


def _open_streams(make: Callable[[], Any], padding: bytes = b"") -> Callable[[Path], Any]:
    return lambda path: io.BufferedReader(_Chunks(_unpack(path, make, padding)))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": _open_streams(bz2.BZ2Decompressor),
    ".xz": _open_streams(lzma.LZMADecompressor, b"\0"),
    ".zst": _open_zstandard,
}


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, without its compression."""
    return _OPENERS.get(path.suffix.lower(), lambda path: open(path, "rb"))(path)


def open_span(path: Path, start: int, stop: int) -> BinaryIO:
    """Open those lines of a file, without compression, that begin at the bytes from ``start`` to before ``stop``."""
    return io.BufferedReader(_Chunks(_lines_from(path, start, stop)))  # type: ignore[return-value]


def _lines_from(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        position = max(0, start - 1)
        file.seek(position)
        position += len(file.readline()) if start else 0  # the rest of a line that began before
        while position < stop and (line := file.readline()):
            yield line
            position += len(line)


def first_undecodable(path: Path) -> tuple[int, int, int]:
    """Return position and value of the first byte that is not UTF-8, and the number of such bytes."""
    places: list[tuple[int, int]] = []
    decoder, n_read, n_bad = codecs.getincrementaldecoder("utf-8")("moe_gpt_note"), 0, 0

    def note(error: UnicodeError) -> tuple[str, int]:
        nonlocal n_bad
        assert isinstance(error, UnicodeDecodeError)
        n_bad += 1
        if not places:
            places.append((n_read - n_pending + error.start, error.object[error.start]))
        return "", error.start + 1

    codecs.register_error("moe_gpt_note", note)
    with open_bytes(path) as file:
        while block := file.read(1 << 20):
            n_pending = len(decoder.getstate()[0])
            decoder.decode(block)
            n_read += len(block)
        n_pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    return *places[0], n_bad
