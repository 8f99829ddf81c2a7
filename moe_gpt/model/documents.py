"""Sequences that hold several documents one after another, each of which sees itself only."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_gpt.model.paths import compiles_flex_attention, keeps_documents_apart_by


def positions_within(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return how far each position is from the first of its document in the sequence."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_first, index, 0).cummax(dim=1).values


class DocumentSpans(NamedTuple):
    """Which document each position is in, to be taken one by one.

    It holds the ids and not the lengths: torch.compile compiles again for every new list, and not for a tensor.
    """

    document_ids: Int[Tensor, "B T"]

    def lengths(self) -> list[list[int]]:
        """Return how long each document of each sequence is."""
        return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in self.document_ids]


class DocumentBlocks(NamedTuple):
    """Which blocks of queries see which blocks of keys: FlexAttention's ``BlockMask``."""

    mask: Any


DocumentMask = Bool[Tensor, "B 1 T T"] | DocumentBlocks | DocumentSpans


def document_mask(document_ids: Int[Tensor, "B T"]) -> DocumentMask:
    """Return which positions see which: those of their own document up to themselves.

    ``paths.keeps_documents_apart_by`` decides in which form.
    """
    T, device = document_ids.shape[1], document_ids.device
    match keeps_documents_apart_by(T, device):
        case "blocks":
            return document_blocks(document_ids)
        case "spans":
            return DocumentSpans(document_ids)
    is_past = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return is_past & (document_ids[:, None, :, None] == document_ids[:, None, None, :])


def attend_one_by_one(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G T Dh"],
    values: Float[Tensor, "B G T Dh"],
    spans: DocumentSpans,
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v, causal, of each document by itself."""
    if torch.compiler.is_compiling():  # other documents at every step would compile it again
        return torch.compiler.disable(attend_one_by_one)(queries, keys, values, spans)
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


def document_blocks(document_ids: Int[Tensor, "B T"]) -> DocumentBlocks:
    """Return the same as a mask for FlexAttention."""
    B, T = document_ids.shape
    mask = _flex_attention("create_block_mask", document_ids.device)(
        lambda b, head, query, key: (query >= key) & (document_ids[b, query] == document_ids[b, key]),
        B, None, T, T, device=document_ids.device,
    )  # fmt: skip
    return DocumentBlocks(mask)


def attend_in_blocks(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G T Dh"],
    values: Float[Tensor, "B G T Dh"],
    blocks: DocumentBlocks,
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v over what each position sees, by FlexAttention (arXiv 2412.05496)."""
    is_grouped = keys.shape[1] < queries.shape[1]
    attend = _flex_attention("flex_attention", queries.device)
    return attend(queries, keys, values, block_mask=blocks.mask, enable_gqa=is_grouped)


@functools.cache
def _flex_attention(name: str, device: torch.device) -> Callable[..., Any]:
    """Return a function of FlexAttention; importing it takes a second, so only who uses it pays."""
    function = getattr(importlib.import_module("torch.nn.attention.flex_attention"), name)
    return torch.compile(function) if compiles_flex_attention(device) else function
