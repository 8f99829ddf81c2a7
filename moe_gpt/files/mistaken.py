"""What lies in the place of a file or beside it: pointers, error pages, unfinished downloads, other formats.

Each text says what was found and what to do, as the end of an error message.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import yaml

_AGAIN = "download the file again"
_PAGE = re.compile(rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html\b|\?xml)")
_UNFINISHED = ("incomplete", "part", "partial", "crdownload", "download", "aria2")


def disguise(path: Path) -> str | None:
    """Say what a file in the place of a model's is in truth; None for one that begins as no other kind does."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return f"it is empty; {_AGAIN}"
    if start == bytes(512):
        return f"it begins with zeros, as an unfinished download does; {_AGAIN}"
    if is_page(start):
        return f"it is a web page that a server sent instead; {_AGAIN}"
    what, advice = other_format(start, "as_model") or ("", "")
    return f"it is {what}; {advice}" if what else None


def is_page(start: bytes) -> bool:
    """Whether a file that starts so is HTML or XML."""
    return _PAGE.match(start) is not None


def other_format(start: bytes, wanted: str) -> tuple[str, str] | None:
    """Say what a file is that starts so, and what to do; None where it may be what was wanted.

    Args:
        start: the file's first bytes.
        wanted: ``as_text`` or ``as_model``.
    """
    for kind in known_formats()["beginnings"]:
        advice = kind.get(wanted, kind.get("advice"))
        if advice and start.startswith(tuple(beginning.encode("latin-1") for beginning in kind["starts"])):
            return kind["what"], advice
    return None


def other_weights(folder: Path) -> str:
    """Name weights in a folder that are of another format, with the way to convert them; empty if there are none."""
    for kind in known_formats()["weights"]:
        for path in sorted(folder.glob(kind["names"]))[:1]:
            return f"; {path.name} is {kind['what']}; {kind['advice']}"
    return ""


@functools.cache
def known_formats() -> dict[str, list[dict[str, Any]]]:
    """Return the table of files that are found in the place of others: by first bytes, by suffix, and weights."""
    return yaml.safe_load(Path(__file__).with_name("other_formats.yaml").read_text(encoding="utf-8"))


def unfinished_download(folder: Path) -> str:
    """Name a download into a folder that has not ended; empty if there is none."""
    cache = folder.resolve().parents[1:2]  # of a folder in the cache of Hugging Face, the one with blobs/
    places = [folder, folder / ".cache" / "huggingface" / "download", *(place / "blobs" for place in cache)]
    found = itertools.chain.from_iterable(place.glob(f"*.{end}") for place in places for end in _UNFINISHED)
    return next((f"; {path} is a download that has not ended: start it again" for path in found), "")


def odd_name(path: Path) -> str | None:
    """Say that a path is not UTF-8, which the library safetensors cannot open; None for one that is."""
    is_text = str(path).encode("utf-8", "ignore").decode() == str(path)
    return None if is_text else "its path is not UTF-8 text; rename the folder"


def cut_off(path: Path) -> str | None:
    """Say by its header how much of a safetensors file is missing; None where nothing is, or it has no such header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = file.read(min(n_header, size))
    if not re.match(rb'\{\s*"', header):
        return None
    ends = re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]', header)
    wanted = 8 + n_header + max(map(int, ends), default=0)
    return f"it has {size:,} of the {wanted:,} bytes that its header says; {_AGAIN}" if size < wanted else None
