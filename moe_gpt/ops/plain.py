"""The model's operations, each in its plainest form: this page is their definition, and every faster way equals it.

Nothing here is ever optimised. ``moe_gpt.ops.using("plain")`` makes a model compute by this page alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED_TARGET = -100


def linear(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "F D"]) -> Float[Tensor, "*batch F"]:
    """Return x Wᵀ, in autocast's type if any."""
    return F.linear(x, weight)


def rms_norm(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*batch D"]:
    """Return x / rms(x) · weight (arXiv 1910.07467), computed in float32, in x's type."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def rotary_angles(
    positions: Int[Tensor, "#B T"], head_dim: int, rope_theta: float
) -> tuple[Float[Tensor, "#B T 1 {head_dim}//2"], Float[Tensor, "#B T 1 {head_dim}//2"]]:
    """Return cosine and sine of each position's angles, one set for all heads, in float32 (RoFormer, eq. 15)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * rope_theta**-exponents
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotate(x: Float[Tensor, "B T heads Dh"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T heads Dh"]:
    """Turn each pair (x[i], x[i + Dh/2]) by its position's angle (RoFormer, eq. 34), in float32, in x's type."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G S Dh"],
    values: Float[Tensor, "B G S Dh"],
    visible: Bool[Tensor, "#B 1 T S"],
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q kᵀ / √Dh) v; each key-value head serves H/G query heads."""
    queries = queries.unflatten(1, (keys.shape[1], -1))  # (B, G, H/G, T, Dh)
    scores = queries @ keys.unsqueeze(2).mT * queries.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    probs = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1)
    return (probs.to(values.dtype) @ values.unsqueeze(2)).flatten(1, 2)


def swiglu(gate_up: Float[Tensor, "*batch gate_and_up"]) -> Float[Tensor, "*batch gate_and_up//2"]:
    """Return silu(gate) · up (arXiv 2002.05202); the last dimension holds the gate's half, then the up half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def largest_indices(scores: Float[Tensor, "N E"], k: int) -> Int[Tensor, "N k"]:
    """Return where each row's k largest numbers are, the largest first; of equal ones the first counts as larger."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def mix_experts(
    x: Float[Tensor, "N D"],
    expert_indices: Int[Tensor, "N K"],
    expert_weights: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E twoF D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Return Σ_k weight_k · expert_k(x), expert by expert, summed in the weights' type, float32."""
    y = x.new_zeros(x.shape, dtype=expert_weights.dtype)
    for expert in range(len(gate_up)):
        token, choice = torch.where(expert_indices == expert)
        answer = F.linear(swiglu(F.linear(x[token], gate_up[expert].to(x.dtype))), down[expert].to(x.dtype))
        y = y.index_add(0, token, expert_weights[token, choice, None] * answer)
    return y


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Return the sum of -ln p(target) over the targets that count, in float32 or more."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED_TARGET)
