"""Whether a tokenizer gives back the text that it encodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from moe_gpt.data.tokenizer import Tokenizer, in_groups

_DOCUMENTS, _CHARS_OF_EACH, _CHARS = 50, 10_000, 1_000_000

_Document = TypeVar("_Document")


def first_of(
    documents: Iterable[_Document], length: Callable[[_Document], int]
) -> tuple[list[_Document], Iterator[_Document]]:
    """Return the first documents, at most 50 or a million characters, and an iterator over all documents."""
    rest = iter(documents)
    first = next(in_groups(itertools.islice(rest, _DOCUMENTS), length, _CHARS), [])
    return first, itertools.chain(first, rest)


def what_is_lost(texts: Iterable[str], tokenizer: Tokenizer, name: str) -> str | None:
    """Return in a sentence what a tokenizer loses of texts; None where it loses nothing.

    Only the first 10,000 characters of each text are read back.

    Args:
        name: what the texts are, such as the name of a source.
    """
    losses = [tokenizer.first_loss(text[:_CHARS_OF_EACH]) for text in texts]
    found = list(filter(None, losses))
    if not found:
        return None
    before, after = found[0]
    return (
        f"the tokenizer loses text of {name}: {len(found)} of the first {len(losses)} documents do not read "
        f"back as they are; {before!r} becomes {after!r}. Bits per byte count the bytes of the text"
    )
