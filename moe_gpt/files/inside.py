"""Paths of files in folders that strangers made: no name and no link leads outside of the folder.

Every file of a model folder, a checkpoint or a run folder that is read gets its path from ``inside``.
"""

from __future__ import annotations

import errno
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from moe_gpt.errors import InputError, shown
from moe_gpt.files.mistaken import disguise, unfinished_download

LARGEST_YAML = 100_000
"""Bytes of a config: YAML needs some hundred times the memory of its text."""
_MOST_VALUES = 500_000
"""Of a JSON file: each needs up to 100 bytes of memory. The largest indices on the hub have some 100,000."""


def inside(folder: str | Path, *names: str, at_most: int | None = None) -> Path:
    """Return the path of a file in a folder after checking where it leads. The file need not be there.

    Links may lead to files of the same folder. In the cache of Hugging Face, they may also lead from a ``snapshots``
    folder into the ``blobs`` folder beside it.

    Args:
        folder: of a stranger.
        names: of the folders below it, if any, and of the file.
        at_most: largest size of the file in bytes, for readers that need many times the memory.

    Raises:
        InputError: for a name with folders in it; for a link that leads outside, to nothing or to itself; for
            something that is no file, or a larger one than ``at_most``.
    """
    for name in names:
        if not re.fullmatch(r"(?!\.{1,2}$)[^/\\:]+", name) or not name.isprintable():
            raise InputError(f"{shown(name)} must be the plain name of a file in {folder}: a path may lead outside")
    path = Path(folder, *names)
    try:
        target = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"{path} is a link to {os.readlink(path)}, which is not there") from None
        return path
    except OSError as error:
        reason = "it is a link that leads to itself" if error.errno == errno.ELOOP else error.strerror
        raise InputError(f"{path} cannot be read: {reason}") from None
    _check_target(path, target, Path(folder).resolve())
    if at_most is not None and target.stat().st_size > at_most:
        raise InputError(f"{path} must have at most {at_most:,} bytes, got {target.stat().st_size:,}")
    return path


def _check_target(path: Path, target: Path, folder: Path) -> None:
    blobs = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"][:1]
    if not any(target.is_relative_to(place) for place in (folder, *blobs)):
        raise InputError(f"{path} is a link to {target}, outside of its folder; put a copy of the file in its place")
    if not target.is_file():
        raise InputError(f"{path} must be a file, got {'a folder' if target.is_dir() else 'a device or a pipe'}")


def parse_json(text: str) -> Any:
    """Return what JSON says, many digits as a ``Decimal``; raise ``ValueError`` also for an object with a key twice."""
    return json.loads(text, object_pairs_hook=_no_key_twice, parse_int=lambda n: Decimal(n) if n[4300:] else int(n))


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return row


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the mapping in a JSON file of a folder.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: where ``inside`` refuses the file, or where it holds something else or too much of it.
    """
    path = inside(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}{unfinished_download(folder)}")
    data = path.read_bytes()
    n_values = sum(map(data.count, (b",", b"[", b"{")))
    if n_values > _MOST_VALUES:
        raise InputError(f"{path} must have at most {_MOST_VALUES:,} values, got about {n_values:,}")
    try:
        values = parse_json(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {disguise(path) or error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values
