"""A mixture-of-experts layer: it routes tokens, drops assignments beyond capacity, and sums expert outputs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_gpt.config import ModelConfig
from moe_gpt.model.experts import Experts
from moe_gpt.model.router import MakeRouter, Router, Routing, check_routing


def within_capacity(
    expert_indices: Int[Tensor, "N K"], n_experts: int, expert_capacity: int | Tensor
) -> Bool[Tensor, "N K"]:
    """Return which assignments get a slot, where each expert has ``expert_capacity`` slots.

    Token-first: slots go to the earliest tokens of the flattened batch. A later token never takes the slot of an
    earlier one, but a token can find its expert filled by earlier ones, those of earlier sequences included. So a
    sequence can get other logits in a batch than alone. Training only.
    """
    chosen = nn.functional.one_hot(expert_indices.flatten(), n_experts)
    # for each assignment, the earlier ones to the same expert; the sum over rows includes the row itself
    n_earlier = (chosen.cumsum(0) - chosen).gather(1, expert_indices.reshape(-1, 1))
    return (n_earlier < expert_capacity).view_as(expert_indices)


def kept_assignments(
    expert_indices: Int[Tensor, "N K"],
    n_experts: int,
    capacity_ratio: tuple[int, int],
    valid_mask: Bool[Tensor, "*batch"] | None = None,
) -> Bool[Tensor, "N K"]:
    """Return which assignments get a slot of their expert; padding takes no slot.

    Args:
        expert_indices: the choices.
        n_experts: how many experts there are.
        capacity_ratio: ``ModelConfig.capacity_ratio``.
        valid_mask: False for padding.
    """
    numerator, denominator = capacity_ratio
    if valid_mask is None:
        return within_capacity(expert_indices, n_experts, ceil_div(expert_indices.numel() * numerator, denominator))
    is_valid = valid_mask.flatten()
    n_assignments = is_valid.sum() * expert_indices.shape[1]
    # padding goes to one more expert, which does not exist, and so takes no slot of a real one
    indices = torch.where(is_valid[:, None], expert_indices, n_experts)
    return within_capacity(indices, n_experts + 1, ceil_div(n_assignments * numerator, denominator))


def ceil_div(a: int | Tensor, b: int) -> int | Tensor:
    """Return a / b of whole numbers, rounded up exactly."""
    return -(-a // b)


class MoE(nn.Module):
    """Send each token to the K of E experts that the router chooses; return the weighted sum of their outputs.

    No assignment is dropped, unless ``capacity_factor`` is set and the module is in training mode. Then those beyond
    the first ceil(capacity_factor · N · K / E) of an expert get the weight 0, and the other weights are not rescaled
    (GShard, arXiv 2006.16668). Experts compute dropped assignments all the same, so dropping saves no time. With
    dropping, a sequence's output depends on the earlier rows of its batch.
    """

    def __init__(self, config: ModelConfig, make_router: MakeRouter = Router) -> None:
        super().__init__()
        self.n_experts, self.capacity_ratio = config.n_experts, config.capacity_ratio
        self.router = make_router(config)
        self.experts = Experts(config)

    def forward(
        self, x: Float[Tensor, "B T D"], valid_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        """Return the layer's output, and the routing, from which ``router_stats`` computes losses and counts.

        Args:
            x: normalised residual stream. Under autocast the experts compute in autocast's type, the router in float32.
            valid_mask: False for padding, which experts compute, but which takes no slot of theirs.
        """
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        if type(self.router) is not Router:  # a user's router, which may return anything
            check_routing(routing, len(tokens), self.n_experts)
        if self.training and self.capacity_ratio is not None:
            kept = kept_assignments(routing.expert_indices, self.n_experts, self.capacity_ratio, valid_mask)
            routing = routing._replace(expert_weights=routing.expert_weights * kept)
        return self.experts(tokens, routing).to(x.dtype).view_as(x), routing
