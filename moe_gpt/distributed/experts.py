"""Experts spread over ranks: tokens go to the rank that holds their expert, and its answers come back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt import ops
from moe_gpt.distributed.cut import Cut, Segment, keep_parts, of_all_ranks
from moe_gpt.distributed.linked import linked
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops import dispatch
from moe_gpt.ops.device import compute_dtype


def spread_experts(model: MoEGPT, mesh: DeviceMesh) -> dict[str, Cut]:
    """Leave each rank its share of every layer's experts, and let their tokens be exchanged, in place.

    Returns:
        how each parameter is cut, by name.
    """
    n_experts = model.config.n_experts
    cut = Cut(mesh, 0, (Segment(n_experts),))
    cuts = {name: cut for name, _ in model.named_parameters() if ".experts." in name}
    keep_parts(model, cuts)
    for layer in model.moe_layers():
        layer.experts.mix = Exchange(mesh, n_experts)  # type: ignore[method-assign, assignment]
    return cuts


class Exchange:
    """Takes the place of ``ops.mix_experts`` where each rank of a mesh (n,) holds ceil(E / n) experts, the last fewer.

    The host waits once a layer to learn how many rows come from each rank.
    """

    def __init__(self, mesh: DeviceMesh, n_experts: int) -> None:
        self._mesh, self._rank, self._n_experts = mesh, mesh.get_local_rank(), n_experts
        self._per_rank = -(-n_experts // mesh.size())

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        expert_indices: Int[Tensor, "N K"],
        expert_weights: Float[Tensor, "N K"],
        gate_up: Float[Tensor, "own F2 D"],
        down: Float[Tensor, "own D F"],
    ) -> Float[Tensor, "N D"]:
        """Return each token's weighted sum over its experts' answers."""
        x = x.to(compute_dtype(x))
        plan = dispatch.plan_dispatch(expert_indices, self._n_experts, alignment=1)
        rows = dispatch.dispatch_tokens(x, plan)  # N·K, sorted by expert
        lengths = plan.segment_ends.diff(prepend=plan.segment_ends.new_zeros(1))
        counts = torch.stack(of_all_ranks(lengths, self._mesh)).tolist()  # rows that each rank has for each expert
        to_each = list(map(sum, self._parts(counts[self._rank])))
        mine = [self._parts(row)[self._rank] for row in counts]
        from_each = list(map(sum, mine))
        arrived = _sent(rows, to_each, from_each, self._mesh)
        answers = _answers(arrived, mine, gate_up, down)
        returned = _sent(answers.to(rows.dtype), from_each, to_each, self._mesh)
        return dispatch.combine_rows(returned, expert_weights, plan)

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


def _sent(rows: Tensor, n_out: list[int], n_in: list[int], mesh: DeviceMesh) -> Tensor:
    """Return what all ranks have sent here; gradients go the way back."""

    def swap(rows: Tensor, n_out: list[int], n_in: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(n_in), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), n_in, n_out, mesh.get_group())
        return arrived

    return linked(rows, lambda x: swap(x, n_out, n_in), lambda grad: swap(grad, n_in, n_out))
