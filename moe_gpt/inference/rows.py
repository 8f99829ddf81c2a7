"""A key-value cache in which each running sequence has a row of its own."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_gpt import ops
from moe_gpt.config import ModelConfig
from moe_gpt.model.cache import KVCache

FEWEST_REUSED = 16
"""Keys of fewer common tokens are computed again: looking further would take longer."""


class Piece(NamedTuple):
    """New tokens of one row."""

    row: int
    start: int
    """Tokens of the row that the cache has already."""
    tokens: list[int]


class RowCache(KVCache):
    """Keys and values of sequences that start and end independently: a row of ``context`` positions for each.

    A row keeps its tokens' keys when its sequence has ended, until another sequence takes it. A new sequence that
    begins with the same tokens, and has the same beside its text, takes the row, or copies of its keys.
    """

    def __init__(
        self, config: ModelConfig, n_rows: int, context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        capacity = -(-context // ops.KEY_BLOCK) * ops.KEY_BLOCK
        super().__init__(dataclasses.replace(config, max_seq_len=capacity), n_rows, capacity, device, dtype)
        self._tokens: list[list[int]] = [[] for _ in range(n_rows)]
        self._beside = [""] * n_rows  # digests
        self._free = deque(range(n_rows))  # the longest unused first
        self._plan = ops.RowPlan([], torch.zeros(1, 0, dtype=torch.long, device=device))
        self._places = torch.zeros(0, dtype=torch.long, device=device)
        self._every_position = torch.arange(capacity, device=device)

    @property
    def n_free(self) -> int:
        """Rows that no sequence has."""
        return len(self._free)

    def take(self, prompt: Sequence[int], reuse: bool = True, beside: str = "") -> tuple[int, int]:
        """Give a row to a new sequence; return the row and how many tokens of the prompt it holds already.

        Args:
            prompt: the sequence's first tokens; the last is never reused, because its logits are wanted.
            reuse: whether to look for keys of the same beginning.
            beside: digest of what the tokens read beside the text, on which their keys depend.
        """
        held = zip(self._tokens, self._beside, strict=True)
        n_common = [_common(tokens, prompt[:-1]) if reuse and digest == beside else 0 for tokens, digest in held]
        free = set(self._free)
        donor = max(range(len(n_common)), key=lambda row: (n_common[row], row in free))
        length = n_common[donor]
        row = donor if length and donor in free else self._free[0]
        self._free.remove(row)
        if length and row != donor:
            for buffer in (self.keys, self.values):
                buffer[:, row, :, :length] = buffer[:, donor, :, :length]
        self._tokens[row], self._beside[row] = list(prompt[:length]), beside
        return row, length

    def keep(self, row: int, length: int) -> None:
        """Forget the tokens of a row beyond the first ``length``: guesses that were wrong."""
        del self._tokens[row][length:]

    def release(self, row: int, is_damaged: bool = False) -> None:
        """Take a row back; one whose numbers are not finite is cleared."""
        if is_damaged:
            self.keys[:, row], self.values[:, row], self._tokens[row] = 0, 0, []
        self._free.append(row)

    def place(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Expect a pass of the model over these tokens; return the pieces in the order in which it reads them."""
        ordered = sorted(pieces, key=lambda piece: (len(piece.tokens), piece.row))
        device, G, C = self.keys.device, self.keys.shape[2], self.capacity
        spans = [(piece.row * G * C, range(piece.start, piece.start + len(piece.tokens))) for piece in ordered]
        flat = torch.tensor([position for _, span in spans for position in span], device=device)
        places = [first + g * C + position for g in range(G) for first, span in spans for position in span]
        self._places = torch.tensor(places, device=device)  # (G·N,)
        groups, start = [], 0
        for n_new, members in groupby(ordered, key=lambda piece: len(piece.tokens)):
            group = list(members)
            end = start + n_new * len(group)
            groups.append(self._group(group, slice(start, end), flat[start:end].view(-1, n_new)))
            start = end
        self._plan = ops.RowPlan(groups, flat[None])
        for piece in ordered:
            self._tokens[piece.row][piece.start :] = piece.tokens
        return ordered

    def _group(self, pieces: list[Piece], tokens: slice, positions: Tensor) -> ops.RowGroup:
        """Return what attention needs to know of pieces that are equally long."""
        rows, n_new = [piece.row for piece in pieces], positions.shape[1]
        longest = max(piece.start for piece in pieces) + n_new
        n_keys = -(-longest // ops.KEY_BLOCK) * ops.KEY_BLOCK
        is_later = self._every_position[:n_keys] > positions[..., None]
        first = rows[0]
        is_run = rows == list(range(first, first + len(rows)))  # then a view will do
        place = slice(first, first + len(rows)) if is_run else torch.tensor(rows, device=positions.device)
        return ops.RowGroup(tokens, place, n_new, is_later)

    def visible(self, n_tokens: int, valid_mask: Bool[Tensor, "B S"] | None = None) -> ops.Visible:
        """Return that each token sees what its row holds before it."""
        return ops.Visible(rows=self._plan)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the placed tokens (1, G, N, Dh); return those of all rows (rows, G, C, Dh)."""
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer[layer].view(-1, buffer.shape[-1]).index_copy_(0, self._places, new.flatten(0, 2).to(buffer.dtype))
        return self.keys[layer], self.values[layer]

    def advance(self, n_tokens: int) -> None:
        """Do nothing: each row has a length of its own, which ``place`` knows."""


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with, 0 where they are fewer than ``FEWEST_REUSED``."""
    if len(prompt) < FEWEST_REUSED or list(held[:FEWEST_REUSED]) != list(prompt[:FEWEST_REUSED]):
        return 0
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt, strict=False)))
