"""Which experts each token goes to, and with what weight.

Token-choice top-k routing (Shazeer et al. 2017, arXiv 1701.06538; Mixtral, arXiv 2401.04088): logits from one
matrix, softmax, the k largest. Everything here is computed in float32, whatever autocast says: in bf16 rounding
changes which experts are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.model.norm import parameter_shapes


class Routing(NamedTuple):
    """A router's decision for N tokens."""

    expert_indices: Int[Tensor, "N K"]
    """The chosen experts, the one with the highest score first."""
    expert_weights: Float[Tensor, "N K"]
    """Weight of each chosen expert's output, float32."""
    router_logits: Float[Tensor, "N E"]
    """Scores before the softmax, noise included, float32."""
    router_probs: Float[Tensor, "N E"]
    """Softmax of the logits: none is negative and each row sums to 1, as the balancing loss assumes."""


def choose_experts(scores: Float[Tensor, "N E"], top_k: int) -> Int[Tensor, "N K"]:
    """Return the ``top_k`` highest-scoring experts of each token, best first. Ties go to the lowest index."""
    return ops.largest_indices(scores, top_k)


class Router(nn.Module):
    """Linear top-k router.

    For a router of your own, subclass it and override ``logits``, or ``scores`` (the experts with the K highest scores
    are chosen), or ``forward``, which must return a ``Routing``. Pass the class to ``MoEGPT(config, make_router=...)``.
    A router gets hidden states, never token ids.

    ``balance: bias`` adds a bias to the probabilities when choosing, and only then: the weights of the chosen come
    from the probabilities alone (loss-free balancing, arXiv 2408.15664, eq. 3). The bias is a buffer that training
    moves once per optimizer step; the router itself never changes it.
    """

    expert_bias: Tensor | None
    extra_repr = parameter_shapes

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.normalize_topk = config.top_k, config.normalize_topk
        self.noise = config.router_noise
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        bias = torch.zeros(config.n_experts) if config.balance == "bias" else None
        self.register_buffer("expert_bias", bias)

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw the weight, normal with ``std``, and clear the balancing bias."""
        nn.init.normal_(self.weight, std=std)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def logits(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """Return the router logits in float32, with noise in training where the config asks for it."""
        with ops.without_autocast(x):
            logits = ops.linear(x.float(), self.weight.float())
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        return logits

    def scores(self, x: Float[Tensor, "N D"], router_probs: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Return the scores that choose: the probabilities, plus the balancing bias if any. ``x`` is for subclasses."""
        return router_probs if self.expert_bias is None else router_probs + self.expert_bias.float()

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        """Choose ``top_k`` experts for each token."""
        router_logits = self.logits(x)
        router_probs = router_logits.softmax(dim=-1)
        expert_indices = choose_experts(self.scores(x, router_probs), self.top_k)
        if self.normalize_topk:  # this softmax equals the chosen probabilities rescaled to sum to 1
            expert_weights = router_logits.gather(-1, expert_indices).softmax(dim=-1)
        else:
            expert_weights = router_probs.gather(-1, expert_indices)
        return Routing(expert_indices, expert_weights, router_logits, router_probs)


def check_routing(routing: object, n_tokens: int, n_experts: int) -> None:
    """Check what a user's router returned for ``n_tokens``. Its K may be any number from 1 to E.

    Raises:
        InputError: where type, shapes or indices are wrong; the message says what the router must return.
    """
    if not isinstance(routing, Routing) or not all(isinstance(part, Tensor) for part in routing):
        raise InputError(f"a router must return a moe_gpt.Routing of four tensors, got {type(routing).__name__}")
    N, E = n_tokens, n_experts
    shapes = [tuple(part.shape) for part in routing]
    K = shapes[0][-1] if shapes[0] else 0
    if shapes != [(N, K), (N, K), (N, E), (N, E)] or not 1 <= K <= E:
        raise InputError(f"a router must return shapes (N, K), (N, K), (N, E), (N, E) with N={N}, E={E}, got {shapes}")
    ops.require_indices(routing.expert_indices, E, "a router must return expert_indices")


MakeRouter = Callable[[ModelConfig], nn.Module]
"""Is called with the config and returns the router of one layer. The class ``Router`` is a ``MakeRouter``."""
