"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): ranks share each matrix product and add up what they get.

Queries, the experts' inner dimension and the vocabulary are cut. What follows from a whole vector is computed by all
ranks alike: norms, routers, and the keys and values of multi-query attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt import ops
from moe_gpt.distributed.linked import linked
from moe_gpt.model.attention import Attention
from moe_gpt.model.experts import Experts, FeedForward
from moe_gpt.model.losses import CrossEntropy
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops import IGNORED_TARGET
from moe_gpt.ops.device import compute_dtype

_TOKENS_AT_ONCE = 1024
"""Tokens whose logits are held at a time."""


class Segment(NamedTuple):
    """Consecutive rows of a parameter: each tensor rank holds a share of them, or all do."""

    length: int
    is_cut: bool


class Cut(NamedTuple):
    """What of a whole parameter this tensor rank holds: of each segment along a dimension, its share."""

    segments: tuple[Segment, ...]
    dim: int
    mesh: DeviceMesh

    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor."""
        rank = self.mesh.get_local_rank()
        segments = tensor.split([segment.length for segment in self.segments], self.dim)
        return torch.cat([x.split(self._shares(s), self.dim)[rank] if s.is_cut else x
                          for s, x in zip(self.segments, segments, strict=True)], self.dim)  # fmt: skip

    def join(self, part: Tensor) -> Tensor:
        """Return the whole tensor, on every rank, from the parts of all."""
        parts = [segments.split(self._lengths(rank), self.dim) for rank, segments in enumerate(self._of_all(part))]
        joined = [torch.cat(of_ranks, self.dim) if segment.is_cut else of_ranks[0]
                  for segment, of_ranks in zip(self.segments, zip(*parts, strict=True), strict=True)]  # fmt: skip
        return torch.cat(joined, self.dim)

    def pieces(self, part: Tensor, starts: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield what this rank answers for, in pieces of one segment each, with their offsets in the whole tensor.

        Args:
            part: of what this rank holds, a part again, if it is sharded too.
            starts: where that begins, along each dimension.
        """
        rank, own_start, start, dim = self.mesh.get_local_rank(), 0, 0, self.dim
        for segment, length in zip(self.segments, self._lengths(rank), strict=True):
            first = max(own_start, starts[dim])
            n = min(own_start + length, starts[dim] + part.shape[dim]) - first
            if n > 0 and (segment.is_cut or rank == 0):
                before = sum(self._shares(segment)[:rank]) if segment.is_cut else 0
                offsets = [*starts[:dim], start + before + first - own_start, *starts[dim + 1 :]]
                yield tuple(offsets), part.narrow(dim, first - starts[dim], n)
            own_start, start = own_start + length, start + segment.length

    @property
    def length(self) -> int:
        """Rows of the whole parameter along ``dim``."""
        return sum(segment.length for segment in self.segments)

    def _shares(self, segment: Segment) -> list[int]:
        """Return what of a segment each rank holds; the first ones hold one more where it does not divide."""
        n = self.mesh.size()
        return [segment.length // n + (rank < segment.length % n) for rank in range(n)]

    def _lengths(self, rank: int) -> list[int]:
        return [self._shares(s)[rank] if s.is_cut else s.length for s in self.segments]

    def _of_all(self, part: Tensor) -> list[Tensor]:
        """Return the parts of all ranks."""
        found = []
        for rank in range(self.mesh.size()):
            shape = list(part.shape)
            shape[self.dim] = sum(self._lengths(rank))
            mine = rank == self.mesh.get_local_rank()
            found.append(part.contiguous().clone() if mine else part.new_empty(shape))
            dist.broadcast(found[-1], group=self.mesh.get_group(), group_src=rank)
        return found


def share_products(model: MoEGPT, mesh: DeviceMesh) -> dict[str, Cut]:
    """Leave each rank its part of every matrix, and let ranks add up their results, in place.

    Returns:
        how each parameter is cut, by name.
    """
    n, cuts = mesh.size(), {}
    for module_name, module in model.named_modules():
        for name, (dim, segments) in _cuts_of(module).items():
            cuts[f"{module_name}.{name}"] = Cut(tuple(segments), dim, mesh)
    vocabulary = Cut((Segment(model.config.vocab_size or 0, True),), 0, mesh)
    cuts |= {f"{name}.weight": vocabulary for name in ("embedding", "output")}
    for name, parameter in model.named_parameters():  # a tied matrix once
        cuts.setdefault(name, Cut((Segment(len(parameter), False),), 0, mesh))
    _keep_parts(model, cuts)
    for module in model.modules():
        if isinstance(module, Attention):
            _share_heads(module, n, mesh)
        elif isinstance(module, Experts | FeedForward):
            module.register_forward_pre_hook(partial(_before_experts, mesh))
            module.register_forward_hook(partial(_after_experts, mesh))
    _share_vocabulary(model, vocabulary)
    return cuts


def _cuts_of(module: nn.Module) -> dict[str, tuple[int, list[Segment]]]:
    """Return the dimension along which each parameter of a module is cut, and its segments."""
    if isinstance(module, Attention):
        heads = module.n_heads * module.head_dim
        keys, is_cut = module.n_kv_heads * module.head_dim, module.n_kv_heads > 1
        segments = [Segment(heads, True), Segment(keys, is_cut), Segment(keys, is_cut)]
        return {"qkv.weight": (0, segments), "out.weight": (1, [Segment(heads, True)])}
    if isinstance(module, Experts):
        inner = module.down.shape[2]
        return {"gate_up": (1, [Segment(inner, True)] * 2), "down": (2, [Segment(inner, True)])}
    if isinstance(module, FeedForward):
        inner = module.down.weight.shape[1]
        return {"gate_up.weight": (0, [Segment(inner, True)] * 2), "down.weight": (1, [Segment(inner, True)])}
    return {}


def _keep_parts(model: MoEGPT, cuts: dict[str, Cut]) -> None:
    """Replace each parameter by this rank's part; parameters that are one stay one."""
    parts: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(module_name, recurse=False)):
            part = cuts[name].part(parameter.detach()).clone()
            setattr(module, name.rpartition(".")[2], parts.setdefault(id(parameter), nn.Parameter(part)))


def _share_heads(attention: Attention, n: int, mesh: DeviceMesh) -> None:
    if attention.n_kv_heads > 1:
        attention.n_kv_heads //= n
    else:
        attention.qkv.forward = partial(_queries_and_shared_keys, attention, mesh)  # type: ignore[method-assign]
    attention.n_heads //= n
    attention.register_forward_pre_hook(lambda _, arguments: (_same(arguments[0], mesh), *arguments[1:]))
    attention.register_forward_hook(lambda _, arguments, result: _added(result, mesh))


def _queries_and_shared_keys(attention: Attention, mesh: DeviceMesh, x: Float[Tensor, "B T D"]) -> Tensor:
    """Multiply by own queries' rows and by the rows of key and value, whose gradients come from the queries of all."""
    own = attention.n_heads * attention.head_dim
    queries, keys_and_values = attention.qkv.weight.tensor_split([own])
    return ops.linear(x, torch.cat([queries, _same(keys_and_values, mesh)]))


def _before_experts(mesh: DeviceMesh, module: nn.Module, arguments: tuple) -> tuple:
    x, other = arguments
    if isinstance(module, Experts):
        other = other._replace(expert_weights=_same(other.expert_weights, mesh))
    return _same(x, mesh), other


def _after_experts(mesh: DeviceMesh, module: nn.Module, arguments: tuple, result: Any) -> Any:
    return _added(result, mesh) if isinstance(module, Experts) else (_added(result[0], mesh), result[1])


def _share_vocabulary(model: MoEGPT, cut: Cut) -> None:
    """Let each rank embed and score its tokens of the vocabulary."""
    mesh, rank = cut.mesh, cut.mesh.get_local_rank()
    lengths = [cut._lengths(r)[0] for r in range(mesh.size())]
    first, along_last = sum(lengths[:rank]), cut._replace(dim=-1)

    def embed(tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        own, is_here = _within(tokens, first, lengths[rank])
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
            of_all = _stacked(log_sum, mesh).logsumexp(0)
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


def _stacked(vector: Float[Tensor, "N"], mesh: DeviceMesh) -> Float[Tensor, "ranks N"]:
    """Return the vectors of all ranks."""
    found = [torch.empty_like(vector) for _ in range(mesh.size())]
    dist.all_gather(found, vector, group=mesh.get_group())
    return torch.stack(found)


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
