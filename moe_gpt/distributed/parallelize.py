"""What is applied to a finished model from outside: activation checkpointing, then compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_gpt.config import TrainConfig
from moe_gpt.model.transformer import MoEGPT


def apply_execution(model: MoEGPT, config: TrainConfig) -> None:
    """Apply activation checkpointing, then compilation, to each block in place; names of parameters stay."""
    for block in model.blocks:
        if config.activation_checkpointing:
            block.forward = _checkpointed(block.forward)
        if config.compile:
            block.compile()


_CHOICES = {torch.ops.aten.sort.stable, torch.ops.aten.topk.default}


def _checkpointed(forward: Callable) -> Callable:
    """Wrap a forward function so that everything in it is computed again in the backward pass, but for its choices.

    What routers and dispatch sort is kept (some 24 bytes for every token and expert): a second computation that
    rounds otherwise must not send a token elsewhere than the first. A plain closure, because torch.compile looks
    into it and skips a partial.
    """

    def policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in _CHOICES else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def run(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts)

    return run
