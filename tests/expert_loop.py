"""The oracle of the mixture-of-experts layer: a loop over experts that can be checked by reading it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_gpt.model.moe import MoE


def moe_by_loop(
    tokens: Tensor, router_weight: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalize_topk: bool
) -> Tensor:
    """Return Σ_k weight_k · expert_k(token) for tokens (N, D), expert by expert."""
    weights, chosen = (tokens @ router_weight.T).softmax(dim=-1).topk(top_k, dim=-1)
    if normalize_topk:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.zeros_like(tokens)
    for expert in range(len(gate_up)):
        token, choice = torch.where(chosen == expert)
        gate, up = (tokens[token] @ gate_up[expert].T).chunk(2, dim=-1)
        answer = (F.silu(gate) * up) @ down[expert].T
        y = y.index_add(0, token, weights[token, choice, None] * answer)
    return y


def parameters_for_loop(layer: MoE) -> dict[str, Tensor]:
    """Return copies of a layer's weights under the oracle's argument names, ready to collect gradients."""
    weights = {"router_weight": layer.router.weight, "gate_up": layer.experts.gate_up, "down": layer.experts.down}
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
