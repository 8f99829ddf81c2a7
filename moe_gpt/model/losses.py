"""Cross entropy, load balancing and router z loss: pure functions, unweighted, float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_gpt.config import LossConfig, ModelConfig
from moe_gpt.model.paths import compute_dtype, tokens_per_chunk_of_logits

IGNORED_TARGET = -100


class CrossEntropy(NamedTuple):
    """Sum of -ln p(target) over the valid targets, in nats, and how many there are."""

    total: Float[Tensor, ""]
    n_valid: Int[Tensor, ""]


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> CrossEntropy:
    """Return the summed cross entropy in float32; targets of ``IGNORED_TARGET`` do not count.

    It is a sum so that the caller can divide by the valid tokens of the whole batch, over all micro-batches.
    """
    total = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return CrossEntropy(total, (targets != IGNORED_TARGET).sum())


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"]
) -> CrossEntropy:
    """Return ``cross_entropy(hidden @ weight.T, targets)`` without ever holding the logits of all tokens.

    Logits are made for some tokens at a time (``paths.tokens_per_chunk_of_logits``) and turned into their gradient at
    once, in the forward pass, as in Liger Kernel (arXiv 2410.10989, section 3.2): memory does not grow with N·V, and
    the logits never leave a CPU's caches. Products run in the type that autocast says, the rest in float32.
    """
    dtype = compute_dtype(hidden)
    total = _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets)
    return CrossEntropy(total, (targets != IGNORED_TARGET).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_gradients = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        total = hidden.new_zeros((), dtype=grad_weight.dtype)
        chunk = tokens_per_chunk_of_logits(hidden.device, len(weight))
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            is_valid = wanted != IGNORED_TARGET
            wanted = wanted.masked_fill(~is_valid, 0)
            log_probs = torch.mm(part, weight.t()).log_softmax(-1, dtype=grad_weight.dtype)
            total -= (log_probs.gather(1, wanted) * is_valid).sum()
            if grad_hidden is not None:  # softmax minus one at the target, nothing where there is none
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=grad_logits.dtype))
                grad_logits = grad_logits.mul_(is_valid).to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk])
                grad_weight += torch.mm(grad_logits.t(), part)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None


def load_balancing_loss(
    router_probs: Float[Tensor, "N E"],
    tokens_per_expert: Int[Tensor, "E"],
    valid_mask: Bool[Tensor, "N"] | None = None,
) -> Float[Tensor, ""]:
    """Return E · Σ_e f_e · P_e for one layer (Switch Transformers, arXiv 2101.03961, eq. 4-6).

    f_e is the share of all N·K assignments that expert e got, before any dropping; P_e the mean router
    probability. Dividing by K too makes it 1 under uniform routing for every K (Hugging Face's is K times that),
    and E when one expert gets everything. The gradient flows through P only.
    """
    shares = tokens_per_expert.float() / tokens_per_expert.sum().clamp(min=1)
    return router_probs.shape[-1] * (shares * _mean(router_probs, valid_mask)).sum()


def router_z_loss(
    router_logits: Float[Tensor, "N E"], valid_mask: Bool[Tensor, "N"] | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared log-partition of the router (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _mean(router_logits.logsumexp(dim=-1).square(), valid_mask)


def _mean(values: Tensor, valid_mask: Tensor | None) -> Tensor:
    if valid_mask is None:
        return values.mean(dim=0)
    weights = valid_mask.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    return (weights * values).sum(dim=0) / weights.sum().clamp(min=1)  # no matrix product: autocast would round it


class LossTerms(NamedTuple):
    """The value that is differentiated and the unweighted terms it is made of."""

    loss: Float[Tensor, ""]
    ce_loss: Float[Tensor, ""]
    load_balancing_loss: Float[Tensor, ""]
    router_z_loss: Float[Tensor, ""]


def combine_losses(
    ce_loss: Tensor, balancing: Tensor | None, z: Tensor | None, model: ModelConfig, weights: LossConfig
) -> LossTerms:
    """Add the terms with their weights.

    Args:
        ce_loss: mean cross entropy.
        balancing: load-balancing loss of each layer (L,), or None for a dense model, whose terms are 0.
        z: router z loss of each layer (L,), or None.
        model: says whether the balancing loss is used at all (``balance: loss``).
        weights: the terms' weights; the terms are averaged over layers first.
    """
    zero = torch.zeros_like(ce_loss)
    balancing = zero if balancing is None else balancing.mean()
    z = zero if z is None else z.mean()
    balance_weight = weights.load_balancing_loss_weight if model.balance == "loss" else 0.0
    loss = ce_loss + balance_weight * balancing + weights.router_z_loss_weight * z
    return LossTerms(loss, ce_loss, balancing, z)
