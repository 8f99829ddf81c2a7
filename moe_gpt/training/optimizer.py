"""AdamW with the usual two groups: weight decay for matrices, none for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_gpt.config import OptimizerConfig
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return a fused AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Weight decay applies to attention, experts, router and output matrices; not to norms and not to the embedding
    (a tied output matrix counts as the embedding). The balancing bias is a buffer, so the optimizer never sees it.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": config.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        is_exempt = parameter.dim() < 2 or id(parameter) in embeddings
        groups[is_exempt]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def check_optimizer(model: MoEGPT, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``InputError`` if the optimizer lacks a trainable parameter, which would silently never learn."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        raise InputError(
            f"the optimizer does not have {', '.join(left_out[:5])}; change the model before the optimizer is built: "
            "give set_up_run or moe_gpt.train a make_router, or freeze these parameters with requires_grad_(False)"
        )


@torch.no_grad()
def update_expert_bias(model: MoEGPT, tokens_per_expert: Tensor, rate: float | Tensor) -> None:
    """Move each expert's balancing bias by ``rate`` towards an even load (arXiv 2408.15664, algorithm 1).

    Args:
        model: one with ``balance: bias``.
        tokens_per_expert: counts (L, E) of the whole batch: all micro-batches and ranks together.
        rate: the paper's u.
    """
    for layer, counts in zip(model.moe_layers(), tokens_per_expert, strict=True):
        error = counts.float().mean() - counts.float()
        layer.router.expert_bias += rate * error.sign()
