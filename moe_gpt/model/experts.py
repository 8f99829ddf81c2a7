"""The feed-forward networks: one SwiGLU (arXiv 2002.05202), or E of them in stacked weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.config import ModelConfig
from moe_gpt.model.norm import parameter_shapes
from moe_gpt.model.router import Routing


class FeedForward(nn.Module):
    """The feed-forward network of a dense model: one SwiGLU, without router, sorting and weighted sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = ops.Linear(config.d_model, 2 * config.d_ff)
        self.down = ops.Linear(config.d_ff, config.d_model)

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        nn.init.normal_(self.gate_up.weight, std=std)
        nn.init.normal_(self.down.weight, std=residual_std)

    def forward(
        self, x: Float[Tensor, "*batch D"], valid_mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch D"], None]:
        """Return down(silu(gate(x)) · up(x)), and None for the routing. Only ``MoE`` uses the mask."""
        return self.down(ops.swiglu(self.gate_up(x))), None


class Experts(nn.Module):
    """E SwiGLU networks whose weights are stacked in two tensors.

    An expert that no token chose then has a gradient of zero; with tensors of its own it would have none.
    ``gate_up`` (E, 2F, D) has the gate's rows above those of the up projection; ``down`` is (E, D, F).
    """

    extra_repr = parameter_shapes
    mix = staticmethod(ops.mix_experts)
    """Replaceable: experts on several devices exchange tokens first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.n_experts, 2 * config.d_ff, config.d_model))
        self.down = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_ff))

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=residual_std)

    def forward(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        """Return the sum of each token's K expert outputs, weighted by ``routing.expert_weights``, in float32."""
        return self.mix(x, routing.expert_indices, routing.expert_weights, self.gate_up, self.down)
