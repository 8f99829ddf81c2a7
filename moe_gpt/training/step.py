"""One optimizer step: a function of state, micro-batches and plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_gpt.config import LossConfig, RunConfig
from moe_gpt.data.batches import MicroBatch
from moe_gpt.distributed.pipeline import add_gradients
from moe_gpt.distributed.process import SOLO, Team
from moe_gpt.measure.observation import RoutingSample
from moe_gpt.measure.routing import max_violation
from moe_gpt.model.losses import IGNORED_TARGET, LossTerms, RouterStats, combine_losses
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import Precision, autocast
from moe_gpt.training.optimizer import Optimizer, update_expert_bias
from moe_gpt.training.records.norms import copy_trained, global_norm, gradient_norms, parameter_norms, update_norms
from moe_gpt.training.schedule import StepPlan

_LEAST_SHARE = 1e-30
"""So that a micro-batch without tokens does not divide by 0."""


@dataclass
class TrainState:
    """Everything that changes during training, besides torch's random generators."""

    model: MoEGPT
    optimizer: Optimizer
    step: int = 0
    tokens_seen: int = 0
    skipped_windows: list[tuple[int, int]] = field(default_factory=list)
    """Token ranges [start, end) of the stream that training leaves out since it went back to a checkpoint."""
    skips_in_a_row: int = 0
    """Non-finite steps in a row, up to the last step whose metrics were read."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint."""
    kind: type[MoEGPT] = MoEGPT
    """The model's class before it was parallelized."""
    is_updating: bool = False
    """True while the optimizer writes; an error at that time leaves some weights old and some new."""


class StepMetrics(NamedTuple):
    """What one step did: scalars, averaged over its valid tokens, that stay on the device until they are written."""

    loss: Tensor
    ce_loss: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    max_violation: Tensor
    """Largest expert load over the mean, minus 1 (MaxVio of arXiv 2408.15664), mean over layers; 0 is balanced."""
    dropped_fraction: Tensor
    """Share of assignments beyond capacity."""
    skipped: Tensor
    """1 if a non-finite loss or gradient kept the step from moving the weights, else 0."""


class StepResult(NamedTuple):
    """What one step returns; everything is still on the device."""

    metrics: StepMetrics
    router_stats: RouterStats | None
    """Of the whole batch, by layer; None for a dense model."""
    norms: dict[str, Tensor] | None
    """By group of parameters (``records.norms``), if they were asked for."""
    sample: RoutingSample | None = None
    """How the routers handled the first micro-batch, if the step is recorded in full."""
    extras: Mapping[str, float] = {}
    """What else a step of your own reports; its line of ``metrics.jsonl`` has these keys too."""


def accumulate_gradients(
    model: MoEGPT,
    micro_batches: Sequence[MicroBatch],
    loss_config: LossConfig,
    precision: Precision,
    team: Team = SOLO,
    weight: float = 1.0,
) -> tuple[LossTerms, RouterStats | None]:
    """Add the gradients of a whole batch, times a weight, to ``.grad``.

    Cross entropy is summed and divided by the valid targets of the whole batch, so it does not depend on how the batch
    is cut. The auxiliary terms of each micro-batch are weighted by its share of the tokens that are no padding.
    Several ranks do the same micro-batch at the same time, each with its rows. Each one's loss is its part of a sum,
    and the balancing loss takes the shares of experts in all their rows.

    Returns:
        the loss terms of the whole batch, and its router statistics by layer (None for a dense model).
    """
    device = micro_batches[0].inputs.device
    n_valid_of_each = team.sum(torch.stack([(batch.targets != IGNORED_TARGET).sum() for batch in micro_batches]))
    n_valid = n_valid_of_each.sum().clamp(min=1)
    shares = _shares_of_tokens(micro_batches, n_valid_of_each, team)
    terms_sum, whole = torch.zeros(4, device=device), None

    def loss_of(part: MoEGPT, index: int) -> Tensor:
        """Return the loss of a micro-batch, of a part of the model its share of it."""
        nonlocal terms_sum, whole
        batch, n_together = micro_batches[index], n_valid_of_each[index]
        with autocast(device, precision):
            sum_counts = partial(_sum_counts, team, batch.weight)
            ce, stats = part.cross_entropy(
                batch.inputs, batch.targets, batch.document_ids, sum_counts, batch.valid_mask
            )
        share = shares[index]
        stats = _weighted(stats, batch.weight) if stats else None
        terms = combine_losses(
            # the last factor is 1 where every token has a target
            ce.total / n_together.clamp(min=1) * (n_together / n_valid / share.clamp(min=_LEAST_SHARE)),
            stats.load_balancing_loss if stats else None,
            stats.router_z_loss if stats else None,
            model.config,
            loss_config,
        )
        terms_sum += torch.stack(terms).detach() * share
        if stats:
            whole = _add_stats(whole, stats, share)
        return terms.loss * share * weight

    add_gradients(model, micro_batches, loss_of, team.layout)
    return LossTerms(*team.sum(team.sum(terms_sum), "pipeline").unbind()), _sum_stats(whole, team)


def _shares_of_tokens(micro_batches: Sequence[MicroBatch], n_valid: Tensor, team: Team) -> Tensor:
    """Return the share of the batch's tokens that each micro-batch of all ranks has (n,)."""
    masks = [batch.valid_mask for batch in micro_batches if batch.valid_mask is not None]
    n_tokens = team.sum(torch.stack([mask.sum() for mask in masks])) if masks else n_valid
    return n_tokens / n_tokens.sum().clamp(min=1)


def _sum_counts(team: Team, weight: float, counts: Tensor) -> Tensor:
    """Return the counts of all ranks; those of a row that has weight 0 do not count."""
    return team.sum(counts if weight else torch.zeros_like(counts))


def _weighted(stats: RouterStats, weight: float) -> RouterStats:
    """Return a rank's part of the losses, which are means over rows; counts are those of all ranks already."""
    return stats._replace(
        load_balancing_loss=stats.load_balancing_loss * weight, router_z_loss=stats.router_z_loss * weight
    )


def _sum_stats(stats: RouterStats | None, team: Team) -> RouterStats | None:
    if stats is None:
        return None
    of_rows = team.sum(stats.load_balancing_loss), team.sum(stats.router_z_loss)
    return RouterStats(*(team.sum(part, "pipeline") for part in (*of_rows, *stats[2:])))


def _add_stats(whole: RouterStats | None, stats: RouterStats, share: Tensor) -> RouterStats:
    """Add a micro-batch's router statistics: counts as they are, losses by the share of the valid tokens."""
    weighted = stats._replace(
        load_balancing_loss=stats.load_balancing_loss.detach() * share,
        router_z_loss=stats.router_z_loss.detach() * share,
    )
    return RouterStats(*map(torch.add, whole, weighted)) if whole else weighted


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    plan: StepPlan,
    config: RunConfig,
    precision: Precision,
    with_norms: bool = False,
    team: Team = SOLO,
) -> StepResult:
    """Take one optimizer step and advance ``state``, without waiting for the device.

    A non-finite loss or gradient leaves weights, moments and balancing bias as they are; its tokens count as seen.

    Args:
        micro_batches: the whole batch, or this rank's part of it.
        with_norms: also return the norms of gradients, parameters and updates.
    """
    model, optimizer = state.model, state.optimizer
    model.train()
    terms, stats = accumulate_gradients(model, micro_batches, config.loss, precision, team)
    state.is_updating = True
    found_norms = gradient_norms(model, team) if with_norms else None
    before = copy_trained(model) if with_norms else {}
    max_norm = config.optimizer.max_grad_norm
    grad_norm, skipped = update_weights(model, optimizer, plan.lr, max_norm, terms.loss, team)
    if found_norms is not None:
        found_norms |= parameter_norms(model, team) | update_norms(model, before, team)
    if config.model.balance == "bias" and stats:
        update_expert_bias(model, stats.tokens_per_expert, config.model.bias_update_rate * (1 - skipped))
    state.step += 1
    state.tokens_seen += plan.batch_tokens
    state.is_updating = False
    metrics = StepMetrics(*terms, grad_norm, *_balance_of(stats, torch.zeros_like(skipped)), skipped=skipped)
    return StepResult(metrics, stats, found_norms)


def _balance_of(stats: RouterStats | None, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Return a step's ``max_violation`` and ``dropped_fraction``; both are zero for a dense model."""
    if stats is None:
        return zero, zero
    counts = stats.tokens_per_expert
    return max_violation(counts).mean(), stats.dropped_assignments.sum() / counts.sum().clamp(min=1)


def update_weights(
    model: MoEGPT, optimizer: Optimizer, lr: float, max_grad_norm: float, loss: Tensor, team: Team = SOLO
) -> tuple[Tensor, Tensor]:
    """Step the optimizer with the gradients clipped to ``max_grad_norm``, and clear them.

    The optimizer does the clipping: it divides gradients as it goes, so no extra pass is needed.

    Returns:
        the global norm before clipping; and 1 if norm or loss were not finite, so that nothing moved, else 0.
    """
    grad_norm = global_norm(model, team)
    skipped = 1 - (torch.isfinite(grad_norm) & torch.isfinite(loss)).float()
    optimizer.step(lr, (grad_norm / max_grad_norm).clamp(min=1.0), skipped)
    optimizer.zero_grad()
    return grad_norm, skipped
