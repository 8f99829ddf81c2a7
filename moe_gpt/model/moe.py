"""One mixture-of-experts layer: router, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_gpt.config import ModelConfig
from moe_gpt.model.dispatch import (
    Dispatch,
    combine_rows,
    count_assignments,
    dispatch_tokens,
    plan_dispatch,
    within_capacity,
)
from moe_gpt.model.experts import Experts
from moe_gpt.model.losses import load_balancing_loss, router_z_loss
from moe_gpt.model.paths import compute_dtype, segment_alignment, visits_experts_one_by_one
from moe_gpt.model.router import Router, Routing


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
        self.drops_tokens = factor is not None
        self.capacity_ratio = Fraction(str(factor)).as_integer_ratio() if factor else (0, 1)
        self.router = make_router(config)
        self.experts = Experts(config)

    def forward(
        self, x: Float[Tensor, "B T D"], valid_mask: Bool[Tensor, "B T"] | None = None, with_stats: bool = True
    ) -> tuple[Float[Tensor, "B T D"], RouterStats | None]:
        """Route, compute and combine.

        Args:
            x: normalised residual stream. Under autocast the experts run in its type; the router never does.
            valid_mask: False for padding, which is computed but not counted in losses, statistics or capacity.
            with_stats: return statistics; decoding does without.
        """
        tokens = x.flatten(0, 1)
        valid = None if valid_mask is None else valid_mask.flatten()
        routing = self.router(tokens)
        is_decoding = not with_stats and not self.training
        if is_decoding and visits_experts_one_by_one(routing.expert_indices.numel(), x.device):
            return self._visit(tokens.to(compute_dtype(x)), routing).to(x.dtype).view_as(x), None
        alignment = segment_alignment(routing.expert_indices.numel(), self.n_experts, x.device, compute_dtype(x))
        dispatch = plan_dispatch(routing.expert_indices, self.n_experts, alignment)
        tokens_per_expert = count_assignments(routing.expert_indices, self.n_experts, valid)

        expert_weights, dropped_tokens = routing.expert_weights, tokens_per_expert.new_zeros(())
        if self.training and self.drops_tokens:
            kept = self._kept(routing.expert_indices, dispatch, valid)
            expert_weights = expert_weights * kept
            dropped_tokens = (~kept).sum() if valid is None else (~kept & valid[:, None]).sum()

        rows = dispatch_tokens(tokens.to(compute_dtype(x)), dispatch)
        rows = self.experts(rows, dispatch.segment_ends)
        y = combine_rows(rows, expert_weights, dispatch).to(x.dtype).view_as(x)
        if not with_stats:
            return y, None
        stats = RouterStats(
            load_balancing_loss(routing.router_probs, tokens_per_expert, valid),
            router_z_loss(routing.router_logits, valid),
            tokens_per_expert.detach(),
            dropped_tokens.detach(),
        )
        return y, stats

    def _visit(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Return each token's weighted sum (N, D) in float32, expert by expert: for few tokens."""
        if len(tokens) == 1:  # every operation counts: none of those below that sort tokens by expert
            answers = [self.experts.one(tokens, expert) for expert in routing.expert_indices[0].tolist()]
            return routing.expert_weights @ torch.cat(answers).float()
        expert_of = routing.expert_indices.flatten().tolist()  # of each assignment
        order = sorted(range(len(expert_of)), key=expert_of.__getitem__)
        assignments = torch.tensor(order)
        token_of_row = assignments // self.top_k
        groups = [(expert, len(list(group))) for expert, group in groupby(order, key=expert_of.__getitem__)]
        parts = tokens.index_select(0, token_of_row).split([n_rows for _, n_rows in groups])
        answers = [self.experts.one(part, expert) for part, (expert, _) in zip(parts, groups, strict=True)]
        weighted = torch.cat(answers) * routing.expert_weights.flatten()[assignments, None]
        return torch.zeros_like(weighted[: len(tokens)]).index_add_(0, token_of_row, weighted)

    def _kept(self, indices: Tensor, dispatch: Dispatch, valid: Tensor | None) -> Tensor:
        """Return which assignments (N, K) find room at their expert; padding takes none."""
        n_assigned: int | Tensor = indices.numel()
        if valid is not None:  # padding gets a place of its own, after the last expert
            dispatch = plan_dispatch(torch.where(valid[:, None], indices, self.n_experts), self.n_experts + 1, 1)
            n_assigned = valid.sum() * self.top_k
        factor, per = self.capacity_ratio  # exact: 1.1 of 10 is 11, in floats a little more
        return within_capacity(dispatch, -(-n_assigned * factor // (per * self.n_experts)))
