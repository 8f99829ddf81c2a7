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
    """Dense SwiGLU: what an expert is, without the experts. Pays for no router, sort or combine."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        nn.init.normal_(self.gate_up.weight, std=std)
        nn.init.normal_(self.down.weight, std=residual_std)

    def forward(
        self, x: Float[Tensor, "*batch D"], valid_mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch D"], None]:
        """Return down(silu(gate(x)) · up(x)), and None for the routing; only a mixture of experts uses the mask."""
        return self.down(ops.swiglu(self.gate_up(x))), None


class Experts(nn.Module):
    """E SwiGLU networks in stacked weights, so that an expert which no token chose gets a zero gradient, not None.

    ``gate_up`` (E, 2F, D) holds the gate's rows above the up projection's; ``down`` is (E, D, F).
    """

    extra_repr = parameter_shapes

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.n_experts, 2 * config.d_ff, config.d_model))
        self.down = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_ff))

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=residual_std)

    def forward(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        """Return each token's weighted sum over its experts' answers, in the weights' type, float32."""
        return ops.mix_experts(x, routing.expert_indices, routing.expert_weights, self.gate_up, self.down)
