"""Ways for GPUs and compilers, where nothing may wait to learn a number: grouped products, FlexAttention.

They run on a CPU too, so that tests compare them there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class DocumentBlocks:
    """Which blocks of queries see which blocks of keys: FlexAttention's ``BlockMask`` (arXiv 2412.05496).

    Memory does not grow with the square of the length.
    """

    def __init__(self, document_ids: Int[Tensor, "B T"], is_compiled: bool | None = None) -> None:
        """Make the mask; compiled on a GPU, where uncompiled it would work out the matrix of all pairs."""
        B, T = document_ids.shape
        self.is_compiled = document_ids.device.type == "cuda" if is_compiled is None else is_compiled
        self.mask = _flex_attention("create_block_mask", self.is_compiled)(
            lambda b, head, query, key: (query >= key) & (document_ids[b, query] == document_ids[b, key]),
            B, None, T, T, device=document_ids.device,
        )  # fmt: skip


def attend(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G S Dh"],
    values: Float[Tensor, "B G S Dh"],
    form: Tensor | DocumentBlocks | None,
) -> Float[Tensor, "B H T Dh"]:
    """Return ``plain.attend`` by PyTorch's kernels; ``form`` is what ``ops.prepare`` made, None for causal."""
    is_grouped = keys.shape[1] < queries.shape[1]
    if isinstance(form, DocumentBlocks):
        flex_attention = _flex_attention("flex_attention", form.is_compiled)
        return flex_attention(queries, keys, values, block_mask=form.mask, enable_gqa=is_grouped)
    is_causal = form is None and queries.shape[2] > 1  # one query sees all keys
    return F.scaled_dot_product_attention(queries, keys, values, form, is_causal=is_causal, enable_gqa=is_grouped)


@functools.cache
def _flex_attention(name: str, is_compiled: bool) -> Callable[..., Any]:
    """Return a function of FlexAttention; importing it takes a second, so only who uses it pays."""
    function = getattr(importlib.import_module("torch.nn.attention.flex_attention"), name)
    return torch.compile(function) if is_compiled else function


def apply_experts(
    rows: Float[Tensor, "R D"],
    gate_up: Float[Tensor, "E twoF D"],
    down: Float[Tensor, "E D F"],
    segment_ends: Int[Tensor, "E"],
    swiglu: Callable[[Tensor], Tensor],
) -> Float[Tensor, "R D"]:
    """Apply expert e to the rows of segment e; rows beyond the last segment come back undefined.

    All arguments have one type; ``swiglu`` is what suits it.
    """
    multiply = grouped_mm if fits_grouped_mm(rows, gate_up.shape[1], down.shape[2]) else segment_mm
    return multiply(swiglu(multiply(rows, gate_up, segment_ends)), down, segment_ends)


def fits_grouped_mm(rows: Tensor, *widths: int) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these rows.

    It wants rows whose length is a multiple of 16 bytes; bf16 on CUDA devices of compute capability 8.0 and newer;
    bf16 or float32 on CPUs, but only bf16 when compiled (it has no float32 meta kernel).
    """
    if any(width * rows.element_size() % 16 for width in (rows.shape[1], *widths)):
        return False
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    if rows.is_meta:  # to show what a GPU would be asked for
        return rows.dtype == torch.bfloat16
    if rows.device.type == "cpu":
        return rows.dtype == torch.bfloat16 or (rows.dtype == torch.float32 and not torch.compiler.is_compiling())
    return False


def grouped_mm(
    rows: Float[Tensor, "R I"], weights: Float[Tensor, "E O I"], segment_ends: Int[Tensor, "E"]
) -> Float[Tensor, "R O"]:
    """Multiply each segment by its own matrix in one call, without reading ``segment_ends`` on the host."""
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=segment_ends)


def segment_mm(
    rows: Float[Tensor, "R I"], weights: Float[Tensor, "E O I"], segment_ends: Int[Tensor, "E"]
) -> Float[Tensor, "R O"]:
    """Do the same one segment at a time: any size and type, but the host waits to learn the segments' ends."""
    ends = [rows.shape[0]] * len(weights) if rows.is_meta else segment_ends.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)] + [rows.shape[0] - ends[-1]]
    *segments, rest = rows.split(sizes)
    products = [F.linear(segment, weight) for segment, weight in zip(segments, weights.unbind(), strict=True)]
    return torch.cat([*products, rest.new_zeros(rest.shape[0], weights.shape[1])])
