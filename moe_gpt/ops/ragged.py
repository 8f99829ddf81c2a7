"""Attention of sequences of unequal length, each in a row of one key-value cache: what a server's step needs.

The new tokens of a step lie one after another in one flat sequence. Only attention knows where each belongs.
PagedAttention (arXiv 2309.06180) cuts such a cache into pages that a kernel follows. Here each sequence has a row of
its own: with one key-value head a position is small, and a view of rows needs no kernel and no gathering.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KEY_BLOCK = 64
"""Keys are padded to a multiple of this, and their values are added block by block, in order."""
_ALIGNED = 4
"""Rows of a matrix begin at multiples of this many numbers: for narrow matrices, MKL adds in an order that depends on
the address."""
_MOST_ROWS = 32
"""If more rows than these need company, no number of rows will do."""


def align(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch aligned"]:
    """Append zeros to rows whose length is no multiple of ``_ALIGNED``; return others as they are."""
    missing = -x.shape[-1] % _ALIGNED
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


@functools.cache
def fewest_rows() -> int:
    """Return from how many rows on the bits of a product's row do not depend on their number.

    MKL multiplies few rows by other kernels: one to three on AMD's processors, one to fifteen on Intel's with AVX-512,
    none where MKL_CBWR is strict, as ``import moe_gpt`` sets it for Intel's. It is measured once, in the thread that
    asks first. It is a multiple of ``_ALIGNED``, so that each matrix of a batch begins at an aligned address.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 64, 1024, generator=generator)
    broken = [n for n in range(1, 64) if not all(_is_as_in(x, weight[:width], n) for width in (8, 64))]
    last = max(broken, default=0)
    if last > _MOST_ROWS:
        warnings.warn(f"here, what a request gets depends on its company: {last} rows differ from 64", stacklevel=2)
    return max(_ALIGNED, last + 1 + -(last + 1) % _ALIGNED)


def _is_as_in(x: Tensor, weight: Tensor, n: int) -> bool:
    """Whether the first n rows have the bits that they have among all."""
    linear = torch.nn.functional.linear
    return torch.equal(linear(x[:n], weight), linear(x, weight)[:n])


class RowGroup(NamedTuple):
    """Sequences that have equally many new tokens, so that they attend together."""

    tokens: slice
    """Their part of the flat tokens, R·n of them."""
    rows: slice | Tensor
    """Their R rows of the cache."""
    n_new: int
    """New tokens of each, n."""
    hidden: Bool[Tensor, "R n S"]
    """True for a key that a query may not see; S is a multiple of ``KEY_BLOCK``."""


class RowPlan(NamedTuple):
    """Where the new tokens of a step belong."""

    groups: list[RowGroup]
    positions: Int[Tensor, "1 N"]
    """Each token's position in its sequence."""


def attend(
    queries: Float[Tensor, "1 H N Dh"],
    keys: Float[Tensor, "rows G C Dh"],
    values: Float[Tensor, "rows G C Dh"],
    plan: RowPlan,
) -> Float[Tensor, "1 H N Dh"]:
    """Return softmax(q kᵀ / √Dh) v of each token over the earlier keys of its row, and its own."""
    H, Dh = queries.shape[1], queries.shape[3]
    answers = []
    for group in plan.groups:
        block = queries[0, :, group.tokens].unflatten(1, (-1, group.n_new)).transpose(0, 1)
        answer = _attend_group(block, keys[group.rows], values[group.rows], group.hidden)
        answers.append(answer.transpose(0, 1).reshape(1, H, -1, Dh))
    return torch.cat(answers, dim=2) if len(answers) > 1 else answers[0]


def _attend_group(
    queries: Float[Tensor, "R H n Dh"], keys: Tensor, values: Tensor, hidden: Bool[Tensor, "R n S"]
) -> Float[Tensor, "R H n Dh"]:
    """Attend with the query heads of a key-value head folded into the rows of one product.

    Their number is a multiple of ``fewest_rows``, so that each matrix of a batch begins at an aligned address.
    """
    scale, Dh = queries.shape[-1] ** -0.5, queries.shape[-1]
    queries, keys, values = align(queries), align(keys), align(values)
    (R, H, n, _), G, S = queries.shape, keys.shape[1], hidden.shape[-1]
    folded = queries.reshape(R * G, H // G * n, -1)
    if missing := -folded.shape[1] % fewest_rows():
        folded = torch.nn.functional.pad(folded, (0, 0, 0, missing))
    keys, values = keys[:, :, :S].flatten(0, 1), values[:, :, :S].flatten(0, 1)  # views where G is 1
    scores = torch.bmm(folded * scale, keys.transpose(1, 2))
    scores[:, : H // G * n].view(R, G, H // G, n, S).masked_fill_(hidden[:, None, None], -torch.inf)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    mixed = torch.bmm(probs[:, :, :KEY_BLOCK], values[:, :KEY_BLOCK])
    for start in range(KEY_BLOCK, S, KEY_BLOCK):
        end = start + KEY_BLOCK
        mixed = torch.baddbmm(mixed, probs[:, :, start:end], values[:, start:end])
    return mixed[:, : H // G * n].reshape(R, H, n, -1)[..., :Dh]
