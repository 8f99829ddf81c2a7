"""The output matrix and the cross entropy in one, without ever holding the logits of all tokens.

Logits are made for some tokens at a time and turned into their gradient at once, in the forward pass, as in Liger
Kernel (arXiv 2410.10989, section 3.2): memory does not grow with N·V, and the logits never leave a CPU's caches.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_gpt.ops.plain import IGNORED_TARGET

_LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""8 MB of them on a CPU, which stay in its caches; 268 MB elsewhere, enough to keep a GPU busy."""


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"], chunk: int | None = None
) -> Float[Tensor, ""]:
    """Return the summed loss. Products run in the type of ``hidden`` and ``weight``, the rest in float32.

    Args:
        hidden: what the output matrix reads.
        weight: the output matrix, of the same type.
        targets: ids; ``IGNORED_TARGET`` does not count.
        chunk: tokens whose logits are held at a time; None is what suits the device.
    """
    if chunk is None:
        chunk = max(1, _LOGITS_AT_ONCE.get(hidden.device.type, 1 << 26) // len(weight))
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wants_gradients = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        total = hidden.new_zeros((), dtype=grad_weight.dtype)
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            is_valid = wanted != IGNORED_TARGET
            wanted = wanted.masked_fill(~is_valid, 0)
            logits = torch.mm(part, weight.t())
            probs = logits.softmax(-1, dtype=grad_weight.dtype)
            # the largest probability is at least 1/V, so its logarithm is exact
            log_sum = logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
            total += ((log_sum - logits.gather(1, wanted)) * is_valid).sum()
            if grad_hidden is not None:  # softmax minus one at the target, nothing where there is none
                grad_logits = probs.scatter_add_(1, wanted, probs.new_full((1, 1), -1).expand_as(wanted)).to(
                    hidden.dtype
                )
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk]).mul_(is_valid)
                _add_product(grad_weight, grad_logits.t(), part * is_valid)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)
