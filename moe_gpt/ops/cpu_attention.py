"""Attention on CPUs: matrix products that share key-value heads, by blocks of queries or document by document."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_gpt.ops import gradients, mkl

QUERY_BLOCK = 64
"""Queries at a time in ``attend_in_query_blocks``."""
LONGEST_BY_PRODUCTS = 1024
"""Keys up to which attention is a few matrix products rather than PyTorch's scaled_dot_product_attention.

Its CPU kernel repeats the shared head and makes small products, which takes 0.9 to 1.5 times as long with MKL and up to
ten times with oneDNN (docs/benchmarks.md); beyond that length the memory counts.
"""
LONGEST_BY_MATRIX = 1024
"""Positions up to which documents are kept apart by a matrix of B·T² bytes, and beyond which each attends by itself.

Document by document, short sequences take up to four times as long, and long ones two thirds of the time
(docs/benchmarks.md).
"""


class DocumentSpans(NamedTuple):
    """Which document each position is in, so that attention can take each document by itself.

    It holds the ids and not the lengths: torch.compile compiles again for every new list, and not for a tensor.
    """

    document_ids: Int[Tensor, "B T"]

    def lengths(self) -> list[list[int]]:
        """Return how long each document of each sequence is."""
        return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in self.document_ids]


def attend(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G S Dh"],
    values: Float[Tensor, "B G S Dh"],
    form: Tensor | DocumentSpans | None,
    use_custom_gradient: bool,
) -> Float[Tensor, "B H T Dh"]:
    """Return ``plain.attend``.

    Args:
        queries: of the last T positions.
        keys: of all S positions.
        values: beside the keys.
        form: what ``ops.prepare`` made: a matrix (#B, 1, T, S), documents, or None for causal.
        use_custom_gradient: whether ``cpu.is_worth_it``.
    """
    if isinstance(form, DocumentSpans):
        return attend_per_document(queries, keys, values, form)
    if form is None and queries.shape[2] == 1:  # it sees everything, so the heads that share keys can be its rows
        rows = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[3])
        with mkl.products:  # of a single query they are small, and take oneDNN three times as long
            return F.scaled_dot_product_attention(rows, keys, values).reshape(queries.shape)
    if keys.shape[2] > LONGEST_BY_PRODUCTS:
        return F.scaled_dot_product_attention(
            queries, keys, values, form, is_causal=form is None, enable_gqa=keys.shape[1] < queries.shape[1]
        )
    if form is None and queries.shape[2] == keys.shape[2] and use_custom_gradient:
        return attend_in_query_blocks(queries, keys, values)
    return attend_by_products(queries, keys, values, form)


def attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with the query heads of each key-value head folded into the rows of one matrix product."""
    B, H, T, Dh = queries.shape
    G, S = keys.shape[1:3]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=queries.device).tril(S - T)[None, None]
    bias = queries.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    bias = bias.unsqueeze(2).expand(-1, G, H // G, T, S)
    if bias.shape[0] == 1:  # one mask for all: one matrix, shared by the whole batch
        bias = bias[0, 0].reshape(1, H // G * T, S).expand(B * G, -1, -1)
    else:
        bias = bias.reshape(B * G, H // G * T, S)
    folded = queries.reshape(B * G, H // G * T, Dh)
    scores = torch.baddbmm(bias, folded, keys.reshape(B * G, S, Dh).transpose(1, 2), alpha=Dh**-0.5)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return torch.bmm(probs, values.reshape(B * G, S, Dh)).view(B, H, T, Dh)


def attend_in_query_blocks(
    queries: Float[Tensor, "B H T Dh"], keys: Float[Tensor, "B G T Dh"], values: Float[Tensor, "B G T Dh"]
) -> Float[Tensor, "B H T Dh"]:
    """Compute causal attention by such products, for ``QUERY_BLOCK`` queries at a time and the keys up to them.

    That skips nearly half of the work, and half of the memory for the probabilities.
    """
    return gradients.apply(_QueryBlocks, queries, keys, values)


class _QueryBlocks(torch.autograd.Function):
    """Autograd by itself would add up a full-size gradient of the keys for every block."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        (B, H, T, Dh), G = queries.shape, keys.shape[1]
        keys, values = (x.reshape(B * G, T, Dh) for x in (keys, values))
        # position-major in memory, as the caller's next projection reads it
        mixed = queries.new_empty(B, T, H, Dh).transpose(1, 2)
        future = queries.new_full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu_(1)
        softmax_type = torch.promote_types(queries.dtype, torch.float32)
        probs = []
        for start, end in _blocks(T):
            n = end - start
            block = _fold(queries[:, :, start:end] * Dh**-0.5, G)
            scores = torch.bmm(block, keys[:, :end].transpose(1, 2))
            scores.view(B, H, n, end)[..., start:] += future[:n, :n]
            probs.append(scores.softmax(-1, dtype=softmax_type).to(values.dtype))
            mixed[:, :, start:end] = torch.bmm(probs[-1], values[:, :end]).view(B, H, n, Dh)
        ctx.save_for_backward(queries, keys, values, *probs)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, *probs = ctx.saved_tensors
        B, H, T, Dh = queries.shape
        G = len(keys) // B
        grad_queries = queries.new_empty(B, T, H, Dh).transpose(1, 2)
        grad_keys, grad_values = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (keys, values)
        )
        for (start, end), p in zip(_blocks(T), probs, strict=True):
            upstream = _fold(grad[:, :, start:end], G)
            grad_values[:, :end] += torch.bmm(p.transpose(1, 2), upstream)
            grad_probs = torch.bmm(upstream, values[:, :end].transpose(1, 2))
            # softmax's gradient, p · (g - Σ p g)
            grad_scores = torch._softmax_backward_data(grad_probs, p, -1, p.dtype)
            grad_block = torch.bmm(grad_scores, keys[:, :end]).view(B, H, end - start, Dh)
            torch.mul(grad_block, Dh**-0.5, out=grad_queries[:, :, start:end])
            grad_keys[:, :end] += torch.bmm(grad_scores.transpose(1, 2), _fold(queries[:, :, start:end], G))
        grad_keys *= Dh**-0.5
        return grad_queries, *(x.to(keys.dtype).view(B, G, T, Dh) for x in (grad_keys, grad_values))


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _fold(x: Tensor, n_kv_heads: int) -> Tensor:
    """Return (B, H, n, Dh) as (B·G, H/G·n, Dh): the heads that share a key-value head are rows of one matrix."""
    B, _, _, Dh = x.shape
    return x.reshape(B * n_kv_heads, -1, Dh)


def attend_per_document(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G T Dh"],
    values: Float[Tensor, "B G T Dh"],
    spans: DocumentSpans,
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v, causal, of each document by itself."""
    if torch.compiler.is_compiling():  # other documents at every step would compile it again
        return torch.compiler.disable(attend_per_document)(queries, keys, values, spans)
    is_grouped = keys.shape[1] < queries.shape[1]
    rows = []
    for row, lengths in enumerate(spans.lengths()):
        parts = (x[row : row + 1].split(lengths, dim=2) for x in (queries, keys, values))
        documents = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
            for q, k, v in zip(*parts, strict=True)
        ]
        rows.append(torch.cat(documents, dim=2))
    return torch.cat(rows)
