"""A vocabulary that grows by special tokens, in the tokenizer and in the weights that a run starts with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_gpt.training.saving.initial_weights import InitialWeights

_NOISE = 0.1
"""Of the new rows of the embedding, in standard deviations of the old rows, so that new tokens differ."""


def grow(initial: InitialWeights, tokens: Sequence[str], seed: int) -> InitialWeights:
    """Return initial weights with rows for all these special tokens; those that the tokenizer has stay.

    A new row of the output matrix is the mean of the old rows, so that a new token is as likely as a token is on
    average; a new row of the embedding is their mean with noise. Where a model has more rows than its tokenizer has
    tokens, new tokens take these rows.

    Args:
        tokens: new ones get the ids after the tokenizer's last.
        seed: of the noise.
    """
    tokenizer = initial.tokenizer.with_special_tokens(tokens)
    old, new = initial.tokenizer.vocab_size, tokenizer.vocab_size
    if old == new:
        return initial._replace(tokenizer=tokenizer)
    n_rows = max(new, initial.model.vocab_size or 0)
    model = dataclasses.replace(initial.model, vocab_size=n_rows)
    return initial._replace(
        model=model, tokenizer=tokenizer, read=functools.partial(_grown, initial.read, old, new, n_rows, seed)
    )


def _grown(read: Callable[[], dict[str, Tensor]], old: int, new: int, n_rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _with_rows(tensor, old, new, n_rows, generator if name.startswith("embedding.") else None)
        if name in ("embedding.weight", "output.weight")
        else tensor
        for name, tensor in read().items()
    }


def _with_rows(matrix: Tensor, old: int, new: int, n_rows: int, generator: torch.Generator | None) -> Tensor:
    """Return a matrix (V, D) of ``n_rows`` in which the rows from ``old`` to ``new`` are made from those before."""
    known = matrix[:old].float()
    rows = known.mean(dim=0).expand(new - old, -1)
    if generator:
        rows = rows + _NOISE * known.std(dim=0) * torch.randn(rows.shape, generator=generator)
    rest = matrix[new:]
    grown = torch.cat([matrix[:old], rows.to(matrix.dtype), rest])
    return torch.cat([grown, grown.new_zeros(n_rows - len(grown), grown.shape[1])])
