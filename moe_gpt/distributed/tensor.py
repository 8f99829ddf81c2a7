"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): ranks share each matrix product and add up what they get.

Queries, the experts' inner dimension and the vocabulary are cut. What follows from a whole vector is computed by all
ranks alike: norms, routers, and the keys and values of multi-query attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt import ops
from moe_gpt.distributed.cut import Cut, Segment, keep_parts, of_all_ranks
from moe_gpt.distributed.linked import linked
from moe_gpt.model.attention import Attention
from moe_gpt.model.experts import Experts, FeedForward
from moe_gpt.model.losses import CrossEntropy
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops import IGNORED_TARGET
from moe_gpt.ops.device import compute_dtype

_TOKENS_AT_ONCE = 1024
"""Tokens whose logits are held at a time."""


def share_products(model: MoEGPT, mesh: DeviceMesh) -> dict[str, Cut]:
    """Leave each rank its part of every matrix, and let ranks add up their results, in place.

    Returns:
        how each parameter is cut, by name; all ranks have the others whole.
    """
    cuts: dict[str, Cut] = {}
    for module_name, module in model.named_modules():
        own = {f"{module_name}.{name}": Cut(mesh, *how) for name, how in _cuts_of(module).items()}
        if own:
            _add_up(module, mesh)
        if isinstance(module, Attention):
            _share_heads(module, mesh)
        cuts |= own
    vocabulary = Cut(mesh, 0, (Segment(model.config.vocab_size or 0),))
    cuts |= {f"{name}.weight": vocabulary for name in ("embedding", "output")}
    keep_parts(model, cuts)
    _share_vocabulary(model, vocabulary)
    return cuts


def _cuts_of(module: nn.Module) -> dict[str, tuple[int, tuple[Segment, ...]]]:
    """Return the dimension along which each parameter of a module is cut, and its segments."""
    if isinstance(module, Attention):
        heads = Segment(module.n_heads * module.head_dim)
        keys = Segment(module.n_kv_heads * module.head_dim, is_cut=module.n_kv_heads > 1)
        return {"qkv.weight": (0, (heads, keys, keys)), "out.weight": (1, (heads,))}
    if isinstance(module, Experts):
        inner = Segment(module.down.shape[2])
        return {"gate_up": (1, (inner, inner)), "down": (2, (inner,))}
    if isinstance(module, FeedForward):
        inner = Segment(module.down.weight.shape[1])
        return {"gate_up.weight": (0, (inner, inner)), "down.weight": (1, (inner,))}
    return {}


def _add_up(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let ranks add up what each one's part of a module returns."""

    def before(_: nn.Module, arguments: tuple) -> tuple:
        x, *others = arguments
        if isinstance(module, Experts):
            others = [others[0]._replace(expert_weights=_same(others[0].expert_weights, mesh))]
        return _same(x, mesh), *others

    def after(_: nn.Module, arguments: tuple, result: Any) -> Any:
        return (_added(result[0], mesh), *result[1:]) if isinstance(result, tuple) else _added(result, mesh)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _share_heads(attention: Attention, mesh: DeviceMesh) -> None:
    if attention.n_kv_heads > 1:
        attention.n_kv_heads //= mesh.size()
    else:
        attention.qkv.forward = partial(_queries_and_shared_keys, attention, mesh)  # type: ignore[method-assign]
    attention.n_heads //= mesh.size()


def _queries_and_shared_keys(attention: Attention, mesh: DeviceMesh, x: Float[Tensor, "B T D"]) -> Tensor:
    """Multiply by own queries' rows and by the rows of key and value, whose gradients come from the queries of all."""
    own = attention.n_heads * attention.head_dim
    queries, keys_and_values = attention.qkv.weight.tensor_split([own])
    return ops.linear(x, torch.cat([queries, _same(keys_and_values, mesh)]))


def _share_vocabulary(model: MoEGPT, cut: Cut) -> None:
    """Let each rank embed and score its tokens of the vocabulary."""
    mesh, along_last = cut.mesh, cut._replace(dim=-1)
    first, n_own = cut.spans(mesh.get_local_rank())[0]

    def embed(tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        own, is_here = _within(tokens, first, n_own)
        return _added(F.embedding(own, model.embedding.weight) * is_here[..., None], mesh)

    def score(hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"]) -> CrossEntropy:
        dtype = compute_dtype(hidden)
        total = _CrossEntropyOfAll.apply(_same(hidden, mesh).to(dtype), weight.to(dtype), targets, first, mesh)
        return CrossEntropy(total, (targets != IGNORED_TARGET).sum())

    model.embedding.forward = embed  # type: ignore[method-assign, assignment]
    model.score = score  # type: ignore[method-assign, assignment]
    model.output.register_forward_pre_hook(lambda _, arguments: (_same(arguments[0], mesh),))
    model.output.register_forward_hook(lambda _, arguments, logits: linked(logits, along_last.join, along_last.part))


def _within(tokens: Tensor, first: int, n: int) -> tuple[Tensor, Tensor]:
    """Return tokens as rows of this rank's part of the vocabulary, 0 for others, and which are in it."""
    own = tokens - first
    is_here = (own >= 0) & (own < n)
    return own.masked_fill(~is_here, 0), is_here


class _CrossEntropyOfAll(torch.autograd.Function):
    """``ops.linear_cross_entropy`` of hidden states (N, D), where this rank has the logits of a part of the tokens."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, mesh: DeviceMesh) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _TOKENS_AT_ONCE):
            part, wanted = hidden[start : start + _TOKENS_AT_ONCE], targets[start : start + _TOKENS_AT_ONCE]
            is_valid = wanted != IGNORED_TARGET
            own, is_here = _within(wanted, first, len(weight))
            logits = torch.mm(part, weight.t()).float()
            log_sum = logits.logsumexp(-1)
            of_all = torch.stack(of_all_ranks(log_sum, mesh)).logsumexp(0)
            total += (of_all / mesh.size() * is_valid).sum() - (logits.gather(1, own[:, None])[:, 0] * is_here).sum()
            grad = (logits - of_all[:, None]).exp_()
            grad.scatter_add_(1, own[:, None], -is_here[:, None].to(grad.dtype))
            grad = (grad * is_valid[:, None]).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[start : start + _TOKENS_AT_ONCE])
            grad_weight += torch.mm(grad.t(), part)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        dist.all_reduce(total, group=mesh.get_group())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


def _same(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return what all ranks have alike; its gradients come from the work of all."""
    return linked(tensor, lambda x: x.view_as(x), partial(_sum, mesh=mesh))


def _added(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of what ranks have computed; each one's gradient is that of the sum."""
    return linked(tensor, partial(_sum, mesh=mesh), lambda grad: grad)


def _sum(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=mesh.get_group())
    return total
