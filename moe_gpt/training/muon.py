"""Muon: matrices move along their momentum with all its singular values made equal (kellerjordan.github.io/posts/muon).

Steps have the size of AdamW's (Moonlight, arXiv 2502.16982, eq. 4), so both can have one learning rate. For a single
matrix this is ``torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")``, which takes no stacks of matrices.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe_gpt.distributed.cut import local_part, on_whole, whole_shape

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7


def orthogonalize(matrices: Float[Tensor, "*stack A B"]) -> Float[Tensor, "*stack A B"]:
    """Return U S' Vᵀ of each matrix U S Vᵀ, with S' between 0.7 and 1.2, in bfloat16: five Newton-Schulz iterations.

    All matrices of a stack share each product.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


@torch.no_grad()
def move_along_momentum(
    parameter: Tensor, gradient: Tensor, momentum: Tensor, lr: Tensor, weight_decay: float, decay: float
) -> None:
    """Take one step of Muon with Nesterov momentum, in place.

    Args:
        parameter: a matrix (A, B) or a stack of them (E, A, B), which may be sharded: every rank then makes the whole
            matrix's direction and moves its part.
        gradient: its gradient, or this rank's part of that.
        momentum: the running mean of gradients, which moves, too.
        lr: learning rate, a scalar tensor; at 0 the parameter stays.
        weight_decay: decoupled decay of the parameter.
        decay: of the running mean.
    """
    momentum.lerp_(gradient, 1 - decay)
    direction = on_whole(orthogonalize, gradient.lerp(momentum, decay), parameter).to(parameter.dtype)
    local_part(parameter).mul_(1 - lr * weight_decay).sub_(
        direction * (lr * 0.2 * math.sqrt(max(whole_shape(parameter)[-2:])))
    )
