"""What the steps of preferences and of reinforcement have in common: items in an order, and the optimizer's step."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moe_gpt.config import DataConfig, RunConfig
from moe_gpt.data.stream import Location, in_passes
from moe_gpt.distributed.process import read_launch
from moe_gpt.errors import InputError
from moe_gpt.measure.routing import max_violation
from moe_gpt.model.losses import LossTerms, RouterStats
from moe_gpt.training.optimizer import update_expert_bias
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.setup import Run
from moe_gpt.training.stage import Material
from moe_gpt.training.step import StepMetrics, StepResult, update_weights


class ItemOrder:
    """An endless order of n items: each once in a pass, in another pseudo-random order in every pass.

    Args:
        n_items: how many there are.
        tokens_of_item: by which ``tokens_seen`` counts an item.
        seed: fixes the order.
    """

    def __init__(self, n_items: int, tokens_of_item: int, seed: int) -> None:
        self._n_items, self._tokens_of_item, self._seed = n_items, tokens_of_item, seed

    def take(self, tokens_seen: int, n: int) -> list[int]:
        """Return the numbers of the n items from a place on."""
        first = tokens_seen // self._tokens_of_item
        return in_passes(np.arange(first, first + n), self._n_items, self._seed).tolist()

    def locate(self, token_index: int) -> Location:
        """Return the pass of a token, the item as its document, and its place in it."""
        place, offset = divmod(token_index, self._tokens_of_item)
        return Location(0, place // self._n_items, self.take(token_index, 1)[0], offset)


@dataclasses.dataclass(frozen=True)
class Items(Material):
    """What a stage learns from that is no stream of tokens: pairs of answers, or prompts."""

    items: Sequence[Any]
    held_out: Sequence[Any]
    tokens_of_item: int
    name: ClassVar[str]

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The digests of the items and of pre-training's text."""
        text = repr([tuple(item) for item in (*self.items, *self.held_out)])
        return {**self.data.fingerprint, self.name: hashlib.sha256(text.encode()).hexdigest()}

    @property
    def names(self) -> list[str]:
        """The run has one source."""
        return [self.name]

    def shares(self, config: DataConfig) -> list[float]:
        """Return the tokens of a pass."""
        return [self.tokens_of_item * len(self.items)]

    def stream(self, config: RunConfig, shares: Sequence[float]) -> ItemOrder:
        """Return the order of the items."""
        return ItemOrder(len(self.items), self.tokens_of_item, config.train.seed)

    def passes(self, shares: Sequence[float], total_tokens: int) -> dict[str, float]:
        """Return how often the run visits each item."""
        return {self.name: total_tokens / shares[0]}


def check_steps(config: RunConfig, multiple: int, what: str) -> None:
    """Raise ``InputError`` for steps that a stage cannot take, before anything is prepared.

    They are those on several processes, and those whose rows are no multiple of the rows that belong together.
    """
    n_processes = read_launch(os.environ).size
    if n_processes > 1:
        raise InputError(f"the stage {config.stage} runs in one process, got {n_processes}; start it without torchrun")
    for stage in config.schedule.stages:
        first, last = stage.batch_range
        if first != last:
            raise InputError(f"batch_tokens must be one number in the stage {config.stage}, got [{first}, {last}]")
        rows_of_step(first, stage.seq_len, multiple, what)


def rows_of_step(batch_tokens: int, seq_len: int, multiple: int, what: str) -> int:
    """Return how many rows a step has.

    Raises:
        InputError: where they are no multiple of those that belong together.
    """
    n_rows = batch_tokens // seq_len
    if not n_rows or n_rows % multiple:
        raise InputError(
            f"batch_tokens / seq_len must be a multiple of {multiple} ({what}), got {batch_tokens:,} / {seq_len:,} = "
            f"{n_rows}"
        )
    return n_rows


def update(run: Run, lr: float, terms: LossTerms, stats: RouterStats | None) -> StepResult:
    """Move the weights by the gradients that are there, and the routers' bias by the counts. No step is counted."""
    state, config = run.state, run.config
    state.is_updating = True
    grad_norm, skipped = update_weights(state.model, state.optimizer, lr, config.optimizer.max_grad_norm, terms.loss)
    if config.model.balance == "bias" and stats:
        update_expert_bias(state.model, stats.tokens_per_expert, config.model.bias_update_rate * (1 - skipped))
    state.is_updating = False
    violation = max_violation(stats.tokens_per_expert).mean() if stats else torch.zeros_like(skipped)
    return StepResult(StepMetrics(*terms, grad_norm, violation, torch.zeros_like(skipped), skipped), stats, None)


def count_step(run: Run, plan: StepPlan) -> None:
    """Count a step and its tokens."""
    run.state.step += 1
    run.state.tokens_seen += plan.batch_tokens


def weighted(stats: RouterStats, share: float | Tensor) -> RouterStats:
    """Return statistics of some rows with the losses weighted by their share of the batch."""
    return stats._replace(
        load_balancing_loss=share * stats.load_balancing_loss, router_z_loss=share * stats.router_z_loss
    )


def total(parts: Sequence[RouterStats]) -> RouterStats | None:
    """Return the sum of micro-batches' statistics, None if there are none."""
    tensors = [torch.stack(same).sum(0).detach() for same in zip(*parts, strict=True)]
    return RouterStats(*tensors) if tensors else None
