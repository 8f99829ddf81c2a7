"""Tokens to experts and back, without dropping any and without waiting for the device.

Assignments (token, choice) are sorted by expert, stably, so that every expert's rows form one contiguous segment
(MegaBlocks, arXiv 2211.15841, has the idea; here the segments feed plain grouped matrix products). Segments start
at multiples of ``SEGMENT_ALIGNMENT`` rows, so that the matrix shapes recur from step to step; the buffer has a
fixed number of rows, so nothing depends on values that only the device knows. The rows in between are copies of
the first token whose results nobody reads: they change no output and no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SEGMENT_ALIGNMENT = 64


class Dispatch(NamedTuple):
    """Where the rows of a dispatched buffer come from and go to."""

    token_of_row: Int[Tensor, "R"]
    """The token that each row copies."""
    row_of_assignment: Int[Tensor, "N K"]
    """The row of each token's k-th choice."""
    segment_ends: Int[Tensor, "E"]
    """Where each expert's rows end, int32; the next expert's begin there."""
    rank_in_expert: Int[Tensor, "N K"]
    """How many earlier assignments (by token, then by choice) chose the same expert."""


def plan_dispatch(expert_indices: Int[Tensor, "N K"], n_experts: int, alignment: int = SEGMENT_ALIGNMENT) -> Dispatch:
    """Sort assignments by expert and lay them out in aligned segments. Token order is preserved within an expert."""
    N, K = expert_indices.shape
    flat = expert_indices.flatten()
    order = flat.argsort(stable=True)  # (N·K,) assignment at each sorted place
    expert_of_sorted = flat[order]
    counts = count_assignments(expert_indices, n_experts)
    rank_of_sorted = torch.arange(N * K, device=flat.device) - (counts.cumsum(0) - counts)[expert_of_sorted]
    padded_counts = (counts + alignment - 1) // alignment * alignment
    segment_ends = padded_counts.cumsum(0)
    row_of_sorted = (segment_ends - padded_counts)[expert_of_sorted] + rank_of_sorted

    n_rows = (N * K + n_experts * (alignment - 1)) // alignment * alignment  # enough for every possible routing
    token_of_row = flat.new_zeros(n_rows).scatter(0, row_of_sorted, order // K)
    row_of_assignment = torch.empty_like(flat).scatter(0, order, row_of_sorted)
    rank_in_expert = torch.empty_like(flat).scatter(0, order, rank_of_sorted)
    return Dispatch(token_of_row, row_of_assignment.view(N, K), segment_ends.to(torch.int32), rank_in_expert.view(N, K))


def count_assignments(
    expert_indices: Int[Tensor, "N K"], n_experts: int, valid_mask: Bool[Tensor, "N"] | None = None
) -> Int[Tensor, "E"]:
    """Count the assignments to each expert, those of valid tokens only where a mask is given."""
    ones = (
        torch.ones_like(expert_indices) if valid_mask is None else valid_mask[:, None].expand_as(expert_indices).long()
    )
    return expert_indices.new_zeros(n_experts).scatter_add(0, expert_indices.flatten(), ones.flatten())


class _ScatterTokens(torch.autograd.Function):
    """Copy tokens into rows. The gradient gathers each token's K rows: no accumulation, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_assignment: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_assignment)
        return x[token_of_row]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row_of_assignment,) = ctx.saved_tensors
        return grad[row_of_assignment].sum(dim=1, dtype=torch.float32).to(grad.dtype), None, None


class _GatherRows(torch.autograd.Function):
    """Read the row of every assignment. Each row is read at most once, so the gradient is a plain write."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_of_assignment: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_assignment)
        ctx.n_rows = rows.shape[0]
        return rows[row_of_assignment]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row_of_assignment,) = ctx.saved_tensors
        rows = grad.new_zeros(ctx.n_rows, grad.shape[-1])
        return rows.index_copy(0, row_of_assignment.flatten(), grad.flatten(0, 1)), None


def dispatch_tokens(x: Float[Tensor, "N D"], dispatch: Dispatch) -> Float[Tensor, "R D"]:
    """Copy each token to the rows of the experts it was sent to."""
    return _ScatterTokens.apply(x, dispatch.token_of_row, dispatch.row_of_assignment)


def combine_rows(
    rows: Float[Tensor, "R D"], expert_weights: Float[Tensor, "N K"], dispatch: Dispatch
) -> Float[Tensor, "N D"]:
    """Return each token's weighted sum over its experts' outputs, in the weights' type, float32."""
    chosen = _GatherRows.apply(rows, dispatch.row_of_assignment)  # (N, K, D)
    return (chosen * expert_weights.unsqueeze(-1)).sum(dim=1)


def within_capacity(dispatch: Dispatch, expert_capacity: int | Tensor) -> Bool[Tensor, "N K"]:
    """Return which assignments keep their slot when an expert has ``expert_capacity`` of them.

    Token-first: slots go to the earliest tokens of the flattened batch, so a later token never evicts an earlier
    one. Who is dropped still depends on earlier sequences of the batch, so with dropping a sequence does not get
    the same logits alone and in a batch. Training only.
    """
    return dispatch.rank_in_expert < expert_capacity
