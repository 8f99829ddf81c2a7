"""AdamW with the usual two groups: matrices decay, everything else does not."""

from __future__ import annotations

import torch
from torch import nn

from moe_gpt.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return a fused AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Weight decay applies to attention, experts, router and output matrices; not to norms and not to the embedding
    (a tied output matrix counts as the embedding). The balancing bias is a buffer and not optimised at all.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in parameters if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for p in parameters if p.dim() < 2 or id(p) in embeddings]
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
