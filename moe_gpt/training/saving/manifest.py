"""Which files a checkpoint has, and whether they are as they were saved.

Tensors of a large model are in one file of each rank, such as ``model-00001-of-00004.safetensors`` (``shards.py``); the
manifest lists these files then in place of the whole one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from moe_gpt.errors import InputError
from moe_gpt.files.durable import FileDigest, read_digest
from moe_gpt.files.inside import inside

MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER, GENERATORS = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
STATE, CONFIG, TOKENIZER = "state.json", "config.yaml", "tokenizer.json"
FILES = (WEIGHTS, OPTIMIZER, GENERATORS, STATE, CONFIG, TOKENIZER)
FILES_TO_USE_A_MODEL = (WEIGHTS, STATE, CONFIG, TOKENIZER)
_LARGEST_MANIFEST = 10_000_000
"""Bytes; each rank that saves shards adds some 310."""


def shard_name(name: str, rank: int, n_ranks: int) -> str:
    """Return the name of a rank's file."""
    stem, suffix = name.split(".")
    return f"{stem}-{rank + 1:05d}-of-{n_ranks:05d}.{suffix}"


def files_of(path: Path, names: tuple[str, ...]) -> list[str]:
    """Return the files of a checkpoint that hold what ``names`` says; several for tensors of several ranks."""
    manifest = read_manifest(path)
    return [file for name in names for file in _files_of(manifest, name)]


def verify_files(path: Path, names: tuple[str, ...]) -> None:
    """Compare files of a checkpoint with its manifest: sizes first, so that foreign files are never read.

    Raises:
        InputError: naming the checkpoint and the file that is missing, changed or foreign.
    """
    manifest = read_manifest(path)
    files = [file for name in names for file in _files_of(manifest, name)]
    for file in files:
        _check_size(path, file, manifest[file].bytes)
    for file in files:
        if read_digest(inside(path, file)) != manifest[file]:
            raise InputError(f"checkpoint {path}: {file} has changed since it was saved, because its SHA-256 differs")


def _check_size(path: Path, name: str, wanted: int) -> None:
    file = inside(path, name)
    if not file.is_file():
        raise InputError(f"checkpoint {path}: {name} is missing")
    size = file.stat().st_size
    if size != wanted:
        raise InputError(f"checkpoint {path}: {name} has {size:,} bytes, but {wanted:,} were saved")


def read_manifest(path: Path) -> dict[str, FileDigest]:
    """Return size and digest of every file."""
    try:
        values = json.loads(inside(path, MANIFEST, at_most=_LARGEST_MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it must be an object, got {type(values).__name__}")
        if set(values) != {file for name in FILES for file in _files_of(values, name)}:
            raise ValueError(f"the manifest must list {', '.join(FILES)}, got {', '.join(map(str, values))[:200]}")
        return {name: _digest(**values[name]) for name in values}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"checkpoint {path}: {MANIFEST} cannot be used: {error}") from None


def _digest(**values: Any) -> FileDigest:
    digest = FileDigest(**values)
    if not isinstance(digest.bytes, int) or not isinstance(digest.sha256, str):
        raise ValueError("every file needs bytes as a whole number and sha256 as text")
    return digest


def _files_of(manifest: Any, name: str) -> list[str]:
    """Return the files that a manifest lists for a name: itself, or those of all ranks."""
    stem, suffix = name.split(".")
    n_ranks = [re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}", file) for file in manifest]
    numbers = {int(found[1]) for found in n_ranks if found}
    if name in manifest or len(numbers) != 1:
        return [name]
    n = numbers.pop()
    return [shard_name(name, rank, n) for rank in range(n)]
