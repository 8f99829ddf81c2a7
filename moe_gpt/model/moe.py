"""One mixture-of-experts layer: router, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_gpt.config import ModelConfig
from moe_gpt.model.dispatch import combine_rows, count_assignments, dispatch_tokens, plan_dispatch, within_capacity
from moe_gpt.model.experts import Experts
from moe_gpt.model.losses import load_balancing_loss, router_z_loss
from moe_gpt.model.router import Router


class RouterStats(NamedTuple):
    """What a layer's router did, as return values; the model stacks them over layers (L first)."""

    load_balancing_loss: Float[Tensor, "*L"]
    """Unweighted, differentiable; 1 is perfect balance."""
    router_z_loss: Float[Tensor, "*L"]
    """Unweighted, differentiable."""
    tokens_per_expert: Int[Tensor, "*L E"]
    """Assignments to each expert before dropping; a sum over valid tokens."""
    dropped_tokens: Int[Tensor, "*L"]
    """Assignments that found their expert full; a sum."""


def stack_router_stats(stats: Sequence[RouterStats]) -> RouterStats:
    """Stack the statistics of layers along a new first dimension."""
    return RouterStats(*(torch.stack(parts) for parts in zip(*stats, strict=True)))


class MoE(nn.Module):
    """Send each token to ``top_k`` of ``n_experts`` experts and return the weighted sum of their answers.

    Dropless, unless ``capacity_factor`` is set and the module is in training mode: then an assignment beyond
    ceil(capacity_factor · N · K / E) of its expert contributes nothing, and the kept weights are not rescaled
    (GShard, arXiv 2006.16668). With dropping, a sequence's output depends on the earlier rows of its batch.
    """

    def __init__(self, config: ModelConfig, make_router: Callable[[ModelConfig], nn.Module] = Router) -> None:
        super().__init__()
        self.n_experts, self.top_k = config.n_experts, config.top_k
        factor = config.capacity_factor
        self.capacity_ratio = None if factor is None else Fraction(str(factor)).as_integer_ratio()
        self.router = make_router(config)
        self.experts = Experts(config)

    def forward(
        self, x: Float[Tensor, "B T D"], valid_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], RouterStats]:
        """Route, compute and combine.

        Args:
            x: normalised residual stream. Under autocast the experts run in its type; the router never does.
            valid_mask: False for padding, which is computed but not counted in losses, statistics or capacity.
        """
        tokens = x.flatten(0, 1)
        valid = None if valid_mask is None else valid_mask.flatten()
        routing = self.router(tokens)
        dispatch = plan_dispatch(routing.expert_indices, self.n_experts)
        tokens_per_expert = count_assignments(routing.expert_indices, self.n_experts, valid)

        expert_weights, dropped_tokens = routing.expert_weights, tokens_per_expert.new_zeros(())
        if self.training and self.capacity_ratio is not None:
            n_assigned = routing.expert_indices.numel() if valid is None else valid.sum() * self.top_k
            slots, per = self.capacity_ratio  # exact: 1.1 of 10 is 11, in floats a little more
            expert_capacity = -(-n_assigned * slots // (per * self.n_experts))
            expert_weights, dropped_tokens = self._drop(routing.expert_indices, expert_weights, valid, expert_capacity)

        rows = dispatch_tokens(tokens.to(_compute_dtype(x)), dispatch)
        rows = self.experts(rows, dispatch.segment_ends)
        y = combine_rows(rows, expert_weights, dispatch).view_as(x)
        stats = RouterStats(
            load_balancing_loss(routing.router_probs, tokens_per_expert, valid),
            router_z_loss(routing.router_logits, valid),
            tokens_per_expert.detach(),
            dropped_tokens.detach(),
        )
        return y, stats

    def _drop(
        self, indices: Tensor, weights: Tensor, valid: Tensor | None, expert_capacity: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Zero the weights of assignments beyond their expert's capacity; padding takes no slot."""
        if valid is None:
            kept = within_capacity(plan_dispatch(indices, self.n_experts), expert_capacity)
            dropped = ~kept
        else:  # a place of its own for padding, after the last expert
            indices = torch.where(valid[:, None], indices, self.n_experts)
            kept = within_capacity(plan_dispatch(indices, self.n_experts + 1), expert_capacity)
            dropped = ~kept & valid[:, None]
        return weights * kept, dropped.sum()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that autocast would give a matrix product of x."""
    device_type = x.device.type
    has_autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if has_autocast else x.dtype
