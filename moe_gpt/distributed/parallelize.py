"""What is applied to a finished model from outside, in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_gpt.config import RunConfig, TrainConfig
from moe_gpt.distributed.layout import Layout
from moe_gpt.model.transformer import MoEGPT


def parallelize(model: MoEGPT, config: RunConfig, layout: Layout) -> None:
    """Share products, cut into stages, spread experts, apply checkpointing and compilation to blocks, and shard.

    All of it is done in place.

    Names of parameters stay. The model must have its initial weights, the same on all ranks: so they do not depend on
    the layout.
    """
    if layout.world == 1:
        apply_execution(model, config.train)
        return
    from moe_gpt.distributed.experts import spread_experts
    from moe_gpt.distributed.pipeline import cut_into_stages
    from moe_gpt.distributed.sharding import Meshes, note_holdings, shard
    from moe_gpt.distributed.tensor import share_products

    device_type = model.embedding.weight.device.type
    meshes = Meshes(layout, "cpu" if device_type == "meta" else device_type)  # on meta, parts are counted
    products = share_products(model, meshes.tensor) if layout.tensor > 1 else {}
    stages = cut_into_stages(model, config, layout, meshes.pipeline) if layout.pipeline > 1 else [model]
    spread = spread_experts(model, meshes.expert) if layout.expert > 1 else {}
    apply_execution(model, config.train)
    if layout.data > 1 and layout.zero > 1:
        for stage in stages:
            shard(stage, config, layout, meshes)
    note_holdings(model, meshes, products, spread)


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
