"""Sequences that hold several documents one after another, each of which sees itself only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_LONGEST_BY_MATRIX = 1024


def positions_within(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return how far each position is from the first of its document in the sequence."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_first, index, 0).cummax(dim=1).values


class DocumentSpans(NamedTuple):
    """How long each document of each sequence is, on the host."""

    lengths: list[list[int]]


DocumentMask = Bool[Tensor, "B 1 T T"] | BlockMask | DocumentSpans


def document_mask(document_ids: Int[Tensor, "B T"]) -> DocumentMask:
    """Return which positions see which: those of their own document up to themselves.

    On CUDA it is a mask for FlexAttention, on a CPU with long sequences the documents' lengths: neither grows with the
    square of the length. Otherwise it is a matrix, B·T² bytes: document by document, short sequences take up to four
    times as long on a CPU, and long ones two thirds of the time (docs/benchmarks.md).
    """
    T, device = document_ids.shape[1], document_ids.device
    if device.type == "cuda":
        return block_mask(document_ids)
    if device.type == "cpu" and T > _LONGEST_BY_MATRIX:
        return document_spans(document_ids)
    is_past = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return is_past & (document_ids[:, None, :, None] == document_ids[:, None, None, :])


def document_spans(document_ids: Int[Tensor, "B T"]) -> DocumentSpans:
    """Return the documents' lengths."""
    return DocumentSpans([torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_ids])


@torch.compiler.disable  # other documents at every step would compile it again
def attend_one_by_one(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G T Dh"],
    values: Float[Tensor, "B G T Dh"],
    spans: DocumentSpans,
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v, causal, of each document by itself."""
    is_grouped = keys.shape[1] < queries.shape[1]
    rows = []
    for row, lengths in enumerate(spans.lengths):
        parts = (x[row : row + 1].split(lengths, dim=2) for x in (queries, keys, values))
        documents = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
            for q, k, v in zip(*parts, strict=True)
        ]
        rows.append(torch.cat(documents, dim=2))
    return torch.cat(rows)


def block_mask(document_ids: Int[Tensor, "B T"]) -> BlockMask:
    """Return the same as a mask for FlexAttention."""
    B, T = document_ids.shape

    make = _compiled_on_gpu(create_block_mask, document_ids.device)
    return make(
        lambda b, head, query, key: (query >= key) & (document_ids[b, query] == document_ids[b, key]),
        B, None, T, T, device=document_ids.device,
    )  # fmt: skip


def attend_in_blocks(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G T Dh"],
    values: Float[Tensor, "B G T Dh"],
    mask: BlockMask,
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v over what each position sees, by FlexAttention (arXiv 2412.05496)."""
    is_grouped = keys.shape[1] < queries.shape[1]
    attend = _compiled_on_gpu(flex_attention, queries.device)
    return attend(queries, keys, values, block_mask=mask, enable_gqa=is_grouped)


def _compiled_on_gpu(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return _compiled(function) if device.type == "cuda" else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of FlexAttention: uncompiled they work out the matrix of all pairs."""
    return torch.compile(function)
