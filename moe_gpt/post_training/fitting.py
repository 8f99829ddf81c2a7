"""Rows of data that are longer than a row of tokens: an error with their place, or left out and counted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

from moe_gpt.errors import InputError

_Item = TypeVar("_Item")


class Limit(NamedTuple):
    """How long something may be, and what the config says of longer ones."""

    what: str
    """What is limited, with its verb: the conversation has."""
    tokens: int
    origin: str
    """The settings that the limit follows from."""
    key: str
    """The key of ``on_too_long``."""
    on_too_long: Literal["error", "drop"]


def fitting(
    items: Sequence[_Item], lengths: Sequence[int], places: Sequence[str], limit: Limit
) -> tuple[list[_Item], int]:
    """Return the items that are not too long, and how many are left out.

    Args:
        items: of any kind.
        lengths: tokens of each.
        places: file and row of each.
        limit: the longest that fits, and what happens to longer ones.

    Raises:
        InputError: naming the first that is too long, where the limit says so; or where none is left.
    """
    is_short = [length <= limit.tokens for length in lengths]
    kept = list(itertools.compress(items, is_short))
    n_left_out = len(items) - len(kept)
    if n_left_out and limit.on_too_long == "error":
        first = is_short.index(False)
        raise InputError(
            f"{places[first]}: {limit.what} {lengths[first]:,} tokens, and there is room for {limit.tokens:,} "
            f"({limit.origin}); {n_left_out:,} of {len(items):,} are too long; make room, or leave them out with "
            f"{limit.key}=drop"
        )
    if items and not kept:
        raise InputError(
            f"{places[0]} and all others, {len(items):,} in all, are longer than {limit.tokens:,} tokens "
            f"({limit.origin}), and {limit.key}=drop leaves none"
        )
    return kept, n_left_out


def left_out(n: int) -> str:
    """Return the words that follow a count of what is kept; none where nothing is left out."""
    return f"; {n:,} too long, left out" if n else ""
