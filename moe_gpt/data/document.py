"""A document, and its side of the train/validation split."""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """One document and the text whose hash decides its side of the train/validation split."""

    text: str
    split_key: str


def is_held_out(document: Document, validation_fraction: float) -> bool:
    """Whether a document belongs to the validation split. A hash of its key decides, so it never changes sides."""
    digest = hashlib.sha256(document.split_key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < validation_fraction * 2**64
