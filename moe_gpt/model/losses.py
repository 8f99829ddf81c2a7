"""Cross entropy, load-balancing loss and router z loss: pure functions without weights, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_gpt import ops
from moe_gpt.config import LossConfig, ModelConfig
from moe_gpt.model.moe import kept_assignments
from moe_gpt.model.router import Routing
from moe_gpt.ops import IGNORED_TARGET


class CrossEntropy(NamedTuple):
    """Sum of -ln p(target) over the valid targets, in nats, and how many there are."""

    total: Float[Tensor, ""]
    n_valid: Int[Tensor, ""]


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> CrossEntropy:
    """Return the summed cross entropy in float32; targets of ``IGNORED_TARGET`` do not count.

    It is a sum so that the caller can divide by the valid tokens of the whole batch, over all micro-batches.
    """
    total = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return CrossEntropy(total, (targets != IGNORED_TARGET).sum())


def cross_entropy_from_hidden(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"]
) -> CrossEntropy:
    """Return ``cross_entropy(hidden @ weight.T, targets)`` without ever holding the logits of all tokens."""
    return CrossEntropy(ops.linear_cross_entropy(hidden, weight, targets), (targets != IGNORED_TARGET).sum())


def load_balancing_loss(
    router_probs: Float[Tensor, "*L N E"],
    tokens_per_expert: Int[Tensor, "*L E"],
    valid_mask: Bool[Tensor, "N"] | None = None,
) -> Float[Tensor, "*L"]:
    """Return E · Σ_e f_e · P_e of each layer (Switch Transformers, arXiv 2101.03961, eq. 4).

    f_e is the share of all N·K assignments that expert e got, before any dropping. P_e is its mean probability.
    Uniform routing gives 1 for every K, because the shares are divided by N·K; Hugging Face divides by N and gives K.
    One expert that gets everything (K = 1) gives E. The gradient flows through P only.
    """
    shares = tokens_per_expert.float() / tokens_per_expert.sum(-1, keepdim=True).clamp(min=1)
    return router_probs.shape[-1] * (shares * _mean(router_probs, valid_mask, dim=-2)).sum(-1)


def router_z_loss(
    router_logits: Float[Tensor, "*L N E"], valid_mask: Bool[Tensor, "N"] | None = None
) -> Float[Tensor, "*L"]:
    """Return the mean squared log-partition of the router of each layer (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _mean(router_logits.logsumexp(dim=-1).square(), valid_mask, dim=-1)


def _mean(values: Tensor, valid_mask: Tensor | None, dim: int) -> Tensor:
    """Return the mean over ``dim``, the dimension of the tokens; over the valid tokens where a mask is given."""
    if valid_mask is None:
        return values.mean(dim=dim)
    weights = valid_mask.to(values.dtype)
    total = (values.movedim(dim, -1) * weights).sum(-1)  # not a matrix product, which autocast would round to bf16
    return total / weights.sum().clamp(min=1)


SumCounts = Callable[[Tensor], Tensor]
"""Returns the sum over ranks of counts (L, E)."""


def _counts_of_ranks(counts: Tensor, sum_counts: SumCounts | None) -> Tensor:
    return sum_counts(counts) if sum_counts else counts


class RouterStats(NamedTuple):
    """What the routers did, layer by layer."""

    load_balancing_loss: Float[Tensor, "L"]
    """Unweighted, differentiable; 1 is perfect balance."""
    router_z_loss: Float[Tensor, "L"]
    """Unweighted, differentiable."""
    tokens_per_expert: Int[Tensor, "L E"]
    """How many tokens chose each expert, before dropping. A valid token chooses K experts, padding none."""
    dropped_assignments: Int[Tensor, "L"]
    """How many assignments found their expert full. Those of padding do not count."""


def router_stats(
    routings: Sequence[Routing],
    valid_mask: Bool[Tensor, "B T"] | None = None,
    capacity_ratio: tuple[int, int] | None = None,
    sum_counts: SumCounts | None = None,
) -> RouterStats | None:
    """Return losses and counts of the layers' routings; None if there is no routing, as in a dense model.

    Args:
        routings: one of each layer, from a forward pass.
        valid_mask: False for padding, which does not count.
        capacity_ratio: ``ModelConfig.capacity_ratio`` in training; None where nothing is dropped.
        sum_counts: adds the counts of other ranks, whose tokens belong to the same batch.
    """
    if not routings:
        return None
    if len({routing.expert_indices.shape for routing in routings}) > 1:  # layers of a user's routers may differ in K
        stats = [router_stats([routing], valid_mask, capacity_ratio, sum_counts) for routing in routings]
        return RouterStats(*map(torch.cat, zip(*stats, strict=True)))
    indices, _, logits, probs = (torch.stack(parts) for parts in zip(*routings, strict=True))
    is_valid = None if valid_mask is None else valid_mask.flatten()
    n_experts = probs.shape[-1]
    tokens_per_expert = _counts_of_ranks(count_assignments(indices, n_experts, is_valid), sum_counts)
    n_assignments = n_kept = tokens_per_expert.sum(-1)
    if capacity_ratio is not None:  # MoE computed this too, but its Routing does not say which weights 0 are dropped
        kept = torch.stack([kept_assignments(chosen, n_experts, capacity_ratio, is_valid) for chosen in indices])
        n_kept = (kept if is_valid is None else kept & is_valid[:, None]).sum(dim=(1, 2))
    return RouterStats(
        load_balancing_loss(probs, tokens_per_expert, is_valid),
        router_z_loss(logits, is_valid),
        tokens_per_expert,
        n_assignments - n_kept,
    )


def count_assignments(
    expert_indices: Int[Tensor, "L N K"], n_experts: int, valid_mask: Bool[Tensor, "N"] | None = None
) -> Int[Tensor, "L E"]:
    """Count the assignments to each expert, those of valid tokens only where a mask is given."""
    counted = torch.ones_like(expert_indices)  # 1 for an assignment that counts, else 0
    if valid_mask is not None:
        counted = counted * valid_mask[:, None]
    zeros = expert_indices.new_zeros(len(expert_indices), n_experts)
    return zeros.scatter_add(1, expert_indices.flatten(1), counted.flatten(1))


class LossTerms(NamedTuple):
    """The loss that is differentiated, and its terms before they are weighted."""

    loss: Float[Tensor, ""]
    ce_loss: Float[Tensor, ""]
    load_balancing_loss: Float[Tensor, ""]
    router_z_loss: Float[Tensor, ""]


def combine_losses(
    ce_loss: Tensor, balancing: Tensor | None, z_loss: Tensor | None, model: ModelConfig, weights: LossConfig
) -> LossTerms:
    """Add the terms with their weights.

    Args:
        ce_loss: mean cross entropy.
        balancing: load-balancing loss of each layer (L,), or None for a dense model, whose terms are 0.
        z_loss: router z loss of each layer (L,), or None for a dense model.
        model: its ``balance`` decides whether the balancing loss has a weight (``loss``) or not.
        weights: the weights of the terms, which are means over layers.
    """
    zero = torch.zeros_like(ce_loss)
    balancing = zero if balancing is None else balancing.mean()
    z_loss = zero if z_loss is None else z_loss.mean()
    balance_weight = weights.load_balancing_loss_weight if model.balance == "loss" else 0.0
    loss = ce_loss + balance_weight * balancing + weights.router_z_loss_weight * z_loss
    return LossTerms(loss, ce_loss, balancing, z_loss)
