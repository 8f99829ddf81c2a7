"""What a file is: by its suffix, and by its first bytes, which must be what the suffix promises."""

from __future__ import annotations

import json
from pathlib import Path

from moe_gpt.data.compressed import UnreadableFileError, format_suffix, is_compressed, open_bytes
from moe_gpt.files.mistaken import is_page, known_formats, other_format

FORMATS = {
    ".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet", ".parq": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
"""The format of each suffix. Any other file is text: one document."""
_ZSTANDARD = (b"(\xb5/\xfd", *(bytes([first]) + b"*M\x18" for first in range(0x50, 0x60)))  # frames, and skipped ones
_BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    "parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff"),
    ".gz": (b"\x1f\x8b",), ".bz2": (b"BZh",), ".xz": (b"\xfd7zXZ",), ".zst": _ZSTANDARD,
}  # fmt: skip
_LONG_ROWS = 1 << 20
_PLAIN_NAMES = ("", ".txt", ".text")


def format_of(path: Path) -> str:
    """Return the format that a file's name gives, looking through one layer of compression.

    Raises:
        UnreadableFileError: for archives, documents and other files that hold no text as they are.
    """
    suffix = format_suffix(path)
    for kind in known_formats()["suffixes"]:
        if {suffix, path.suffix.lower()} & set(kind["suffixes"].split()):
            raise UnreadableFileError(f"this is {kind['what']}; {kind['advice']}")
    return FORMATS.get(suffix, "text")


def refuse_disguise(path: Path, kind: str, is_given: bool) -> None:
    """Raise an error for a file that begins otherwise than its name, or its given format, promises."""
    begin = _beginning(path, kind)
    _refuse_beginning(begin, kind, f"a {kind} file" if kind != "text" else "text")
    if kind != "text" or (not is_given and format_suffix(path) in _PLAIN_NAMES):
        _refuse_page(begin)
    if kind != "text" or is_given or not begin.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"{"):
        return
    _refuse_json_lines(path)


def _beginning(path: Path, kind: str) -> bytes:
    """Return the first bytes of a file without its compression; refuse one that cannot be what it says."""
    with open(path, "rb") as file:
        begin = file.read(1024)
    if not begin and (is_compressed(path) or kind in ("parquet", "arrow", "json")):
        raise UnreadableFileError("this has 0 bytes, so it is damaged or a download that has not ended; write it again")
    if is_compressed(path):
        _refuse_beginning(begin, path.suffix.lower(), f"a {path.suffix} file")
        with open_bytes(path) as opened:
            begin = opened.read(1024)
        if "to its name" in (other_format(begin, "as_text") or ("", ""))[1]:
            raise UnreadableFileError("this is packed twice; unpack it once, and name it by what that gives")
    return begin


def _refuse_json_lines(path: Path) -> None:
    with open_bytes(path) as opened:
        begin = opened.read(_LONG_ROWS)
    if begins_with_json_lines(begin.decode("utf-8", "replace")):
        raise UnreadableFileError(
            "this seems to hold a JSON object in each line; set format: lines to read each as a document, or "
            "format: text to read the whole file as one"
        )


def _refuse_beginning(begin: bytes, kind: str, what: str) -> None:
    expected = _BEGINNINGS.get(kind, ())
    if not begin or begin.startswith(expected or (b" ",)):
        return
    if other := other_format(begin, "as_text"):
        raise UnreadableFileError(f"this is {other[0]}, not {what}; {other[1]}")
    if expected:
        raise UnreadableFileError(f"this is not {what}, although its name says so; its first bytes are {begin[:8]!r}")
    if begin[257:262] == b"ustar":
        raise UnreadableFileError("this is a tar archive; unpack it")
    if b"\0" in begin:
        raise UnreadableFileError("this has NUL bytes, so it is not UTF-8 text; convert it")


def _refuse_page(begin: bytes) -> None:
    if is_page(begin) and (b"<?xml" not in begin[:10] or b"<error>" in begin.lower()):
        raise UnreadableFileError(
            "this is an HTML or XML page, perhaps a server's answer instead of the file; download the file again, or "
            "set format: text to read the page as text"
        )


def begins_with_json_lines(text: str) -> bool:
    """Whether the first two lines that are not blank are JSON objects, each by itself."""
    lines = list(filter(str.strip, text.split("\n")))[:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line, parse_int=str), dict) for line in lines)
    except (ValueError, RecursionError):
        return False
