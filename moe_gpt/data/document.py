"""A document, its side of the train/validation split, and random parts of a source."""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """One document and the text whose hash decides its side of the train/validation split."""

    text: str
    split_key: str


def is_held_out(document: Document, validation_fraction: float) -> bool:
    """Whether a document belongs to the validation split. A hash of its key decides, so it never changes sides."""
    return _is_below(validation_fraction, document.split_key)


def is_in_part(document: Document, part: float) -> bool:
    """Whether a document belongs to a random part of a source, in (0, 1]. A smaller part lies within a larger one."""
    return _is_below(part, f"part {document.text}")  # of the text, so that it says nothing about the split


def _is_below(share: float, key: str) -> bool:
    """Whether the key is among the given share of all keys, by its hash."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
