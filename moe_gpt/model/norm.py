"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_gpt import ops


def parameter_shapes(module: nn.Module) -> str:
    """Return the shapes of a module's own parameters. A class shows them in ``repr`` as its ``extra_repr``."""
    return ", ".join(f"{name} {tuple(p.shape)}" for name, p in module.named_parameters(recurse=False))


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv 1910.07467), computed in float32 and returned in x's type."""

    extra_repr = parameter_shapes

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def init_weights(self, std: float, residual_std: float) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Normalise the last dimension."""
        return ops.rms_norm(x, self.weight, self.eps)
