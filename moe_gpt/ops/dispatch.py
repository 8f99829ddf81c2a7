"""Tokens to experts and back, without dropping any and without waiting for the device.

Assignments (token, choice) are sorted by expert, stably, so that every expert's rows form one contiguous segment
(MegaBlocks, arXiv 2211.15841, has the idea; here the segments feed plain grouped matrix products). Segments start
at multiples of ``segment_alignment`` rows, so that the matrix shapes recur from step to step; the buffer has a
fixed number of rows, so nothing depends on values that only the device knows. The rows in between are copies of
the first token whose results nobody reads: they change no output and no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_gpt.ops import gradients


class Dispatch(NamedTuple):
    """Where the rows of a dispatched buffer come from and go to."""

    token_of_row: Int[Tensor, "R"]
    """The token that each row copies."""
    row_of_assignment: Int[Tensor, "N K"]
    """The row of each token's k-th choice."""
    segment_ends: Int[Tensor, "E"]
    """Where each expert's rows end, int32; the next expert's begin there."""


def plan_dispatch(expert_indices: Int[Tensor, "N K"], n_experts: int, alignment: int) -> Dispatch:
    """Sort assignments by expert and lay them out in aligned segments. Token order is preserved within an expert.

    Args:
        expert_indices: the choices of each token.
        n_experts: how many there are.
        alignment: segments start at its multiples: ``segment_alignment``.
    """
    N, K = expert_indices.shape
    flat = expert_indices.flatten()
    order = flat.argsort(stable=True)  # (N·K,) assignment at each sorted place
    expert_of_sorted = flat[order]
    counts = flat.new_zeros(n_experts).scatter_add(0, flat, torch.ones_like(flat))
    rank_of_sorted = torch.arange(N * K, device=flat.device) - (counts.cumsum(0) - counts)[expert_of_sorted]
    padded_counts = (counts + alignment - 1) // alignment * alignment
    segment_ends = padded_counts.cumsum(0)
    row_of_sorted = (segment_ends - padded_counts)[expert_of_sorted] + rank_of_sorted

    n_rows = count_rows(N * K, n_experts, alignment)
    token_of_row = flat.new_zeros(n_rows).scatter(0, row_of_sorted, order // K)
    row_of_assignment = torch.empty_like(flat).scatter(0, order, row_of_sorted)
    return Dispatch(token_of_row, row_of_assignment.view(N, K), segment_ends.to(torch.int32))


def count_rows(n_assignments: int, n_experts: int, alignment: int) -> int:
    """Return the rows of the dispatched buffer: enough for every possible routing."""
    return (n_assignments + n_experts * (alignment - 1)) // alignment * alignment


def segment_alignment(n_assignments: int, n_experts: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of rows at whose multiples every expert's segment starts: a power of two.

    64 where experts have many rows: oneDNN makes and keeps a kernel for every matrix shape, so shapes should recur; a
    GPU's kernels work on tiles. A CPU's float32 products by MKL do not mind the shape: 8 there, and a step of shape S
    takes 4 % less. With fewer rows padding would cost more than it gains, so it is kept to about a sixteenth of them:
    down to 1 on a CPU, and to 8 elsewhere, which grouped_mm needs. A compiler gets a constant: it would compile again
    for every number of rows that gives another result.

    Args:
        n_assignments: tokens times their choices.
        n_experts: among how many.
        device: where the products are computed.
        dtype: of what they multiply.
    """
    if torch.compiler.is_compiling():
        return 16
    is_cpu = device.type == "cpu"
    is_mkl = is_cpu and dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    alignment, smallest = 8 if is_mkl else 64, 1 if is_cpu else 8
    while alignment > smallest and alignment > n_assignments // (8 * n_experts):
        alignment //= 2
    return alignment


class _ScatterTokens(torch.autograd.Function):
    """Copy tokens into rows. The gradient gathers each token's K rows: no accumulation, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_assignment: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_assignment)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        first, *others = ctx.saved_tensors[0].unbind(1)
        total = grad.index_select(0, first).to(torch.promote_types(grad.dtype, torch.float32))
        for row in others:
            total += grad.index_select(0, row)
        return total.to(grad.dtype), None, None


class _CombineRows(torch.autograd.Function):
    """Sum each token's K rows by their weights. The gradients gather, too: nothing is accumulated by index."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, expert_weights: Tensor, token_of_row: Tensor, row_of_assignment: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, expert_weights, token_of_row, row_of_assignment)
        row_of_choice, weight_of_choice = row_of_assignment.unbind(1), expert_weights.unsqueeze(-1).unbind(1)
        combined = rows.index_select(0, row_of_choice[0]) * weight_of_choice[0]
        for row, weight in zip(row_of_choice[1:], weight_of_choice[1:], strict=True):
            # not in place: torch.compile of PyTorch 2.11 would make all gradients zero
            combined = combined.addcmul(rows.index_select(0, row).to(combined.dtype), weight)
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, expert_weights, token_of_row, row_of_assignment = ctx.saved_tensors
        flat = row_of_assignment.flatten()
        weight_of_row = expert_weights.new_zeros(len(rows)).scatter(0, flat, expert_weights.flatten())
        grad_rows = grad.index_select(0, token_of_row)
        grad_weights = (grad_rows * rows).sum(-1)[row_of_assignment]
        # rows that nobody reads have weight 0
        return grad_rows.mul_(weight_of_row[:, None]).to(rows.dtype), grad_weights, None, None


def dispatch_tokens(x: Float[Tensor, "N D"], dispatch: Dispatch) -> Float[Tensor, "R D"]:
    """Copy each token to the rows of the experts it was sent to."""
    return gradients.apply(_ScatterTokens, x, dispatch.token_of_row, dispatch.row_of_assignment)


def combine_rows(
    rows: Float[Tensor, "R D"], expert_weights: Float[Tensor, "N K"], dispatch: Dispatch
) -> Float[Tensor, "N D"]:
    """Return each token's weighted sum over its experts' outputs, in the weights' type, float32."""
    return gradients.apply(_CombineRows, rows, expert_weights, dispatch.token_of_row, dispatch.row_of_assignment)
