"""Experts spread over ranks: tokens go to the rank that holds their expert, and its answers come back."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt import ops
from moe_gpt.distributed.linked import linked
from moe_gpt.ops import dispatch
from moe_gpt.ops.device import compute_dtype


class Exchange:
    """Takes the place of ``ops.mix_experts`` where each rank of a mesh (n,) holds ceil(E / n) experts, the last fewer.

    The host waits once a layer to learn how many rows come from each rank.
    """

    def __init__(self, mesh: DeviceMesh, n_experts: int) -> None:
        self._group, self._rank, self._n_experts = mesh.get_group(), mesh.get_local_rank(), n_experts
        self._per_rank = -(-n_experts // mesh.size())

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        expert_indices: Int[Tensor, "N K"],
        expert_weights: Float[Tensor, "N K"],
        gate_up: Any,
        down: Any,
    ) -> Float[Tensor, "N D"]:
        """Return each token's weighted sum over its experts' answers. ``gate_up`` and ``down`` are DTensors."""
        x = x.to(compute_dtype(x))
        plan = dispatch.plan_dispatch(expert_indices, self._n_experts, alignment=1)
        rows = dispatch.dispatch_tokens(x, plan)  # N·K, sorted by expert
        counts = self._counts_of_all(plan.segment_ends)
        to_each = [sum(part) for part in self._parts(counts[self._rank])]
        mine = [self._parts(row)[self._rank] for row in counts]
        from_each = [sum(part) for part in mine]
        here = partial(_swap, n_in=from_each, n_out=to_each, group=self._group)
        home = partial(_swap, n_in=to_each, n_out=from_each, group=self._group)
        arrived = linked(rows, here, home)
        answers = _answers(arrived, mine, gate_up.to_local(), down.to_local())
        returned = linked(answers.to(rows.dtype), home, here)
        return dispatch.combine_rows(returned, expert_weights, plan)

    def _counts_of_all(self, segment_ends: Int[Tensor, "E"]) -> list[list[int]]:
        """Return how many rows each rank has for each expert."""
        counts = segment_ends.diff(prepend=segment_ends.new_zeros(1))
        of_each = [torch.empty_like(counts) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(of_each, counts, self._group)
        return torch.stack(of_each).tolist()

    def _parts(self, by_expert: list[int]) -> list[list[int]]:
        """Cut what belongs to the experts, in order, into what belongs to each rank."""
        return [by_expert[start : start + self._per_rank] for start in range(0, self._n_experts, self._per_rank)]


def _answers(
    rows: Float[Tensor, "R D"], counts: list[list[int]], gate_up: Tensor, down: Tensor
) -> Float[Tensor, "R D"]:
    """Return the answers of this rank's experts; ``counts`` has the rows of each expert from one rank after another.

    One row of zeros goes along to the first expert: a rank that gets no row must have gradients all the same, or the
    ranks that share its experts would wait for them.
    """
    lengths = torch.tensor([*counts, [1] + [0] * (len(counts[0]) - 1)])
    experts = torch.arange(lengths.shape[1]).repeat(len(lengths)).repeat_interleave(lengths.flatten())
    experts = experts.to(rows.device)[:, None]
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    weights = torch.ones(experts.shape, device=rows.device)
    return ops.mix_experts(rows, experts, weights, gate_up, down)[:-1]


def _swap(rows: Tensor, n_in: list[int], n_out: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(n_in), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), n_in, n_out, group)
    return arrived
