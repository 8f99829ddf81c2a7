"""Ways for CPUs, where every pass over memory counts: custom gradients that work in place, experts one after another.

How attention is computed on a CPU is in ``cpu_attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_gpt.ops import gradients, plain

_FEW_NUMBERS = 1 << 16
_FEW_ASSIGNMENTS = 16
_NUMBERS_AT_ONCE = 1 << 19


def is_worth_it(x: Tensor) -> bool:
    """Whether the custom gradients below are the faster way for ``x``.

    True on a CPU in training and, without gradients, for large tensors: they save passes over memory. False for the few
    numbers of a decoded token, where the extra Python calls cost more than they save; and for a compiler, which fuses
    the plain expressions.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or x.numel() > _FEW_NUMBERS


def rms_norm(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*batch D"]:
    """Return ``plain.rms_norm`` in half the time: PyTorch composes it of elementary operations on a CPU."""
    return gradients.apply(_RMSNorm, x.float(), weight.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        along = grad * normed
        grad_weight = along.flatten(0, -2).sum(dim=0)
        # of the gradient of x / rms(x), what points along x itself goes
        projection = torch.mv(along.flatten(0, -2), weight).view_as(inverse) / weight.numel()
        grad_x = (grad * weight).addcmul_(normed, projection, value=-1).mul_(inverse)
        return grad_x, grad_weight, None


def rotate(x: Float[Tensor, "B T heads Dh"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T heads Dh"]:
    """Return ``plain.rotate`` with both halves written into one buffer."""
    return gradients.apply(_Rotate, x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    result = x.new_empty(x.shape, dtype=torch.float32)
    new_first, new_second = result.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    return result.to(x.dtype)


def swiglu(gate_up: Float[Tensor, "*batch gate_and_up"]) -> Float[Tensor, "*batch gate_and_up//2"]:
    """Return ``plain.swiglu``."""
    return gradients.apply(_SwiGLU, gate_up)


class _SwiGLU(torch.autograd.Function):
    """Writes both gradients into one buffer: autograd would build halves and join them."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _swiglu_backward(grad, *ctx.saved_tensors)[0]


def _swiglu_forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of gate and up, and what the forward pass returned."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    torch.mul(grad, activated, out=grad_up)
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return grad_gate_up, activated.mul_(up)


def largest_indices(scores: Float[Tensor, "N E"], k: int) -> Int[Tensor, "N k"]:
    """Return ``plain.largest_indices``, except that -inf equals the smallest finite number.

    It looks for one maximum after another, because a CPU's sort of a whole row takes long: for a few of 16 experts five
    times as long, for a few of 256 sixteen times.
    """
    if k > scores.shape[1] // 4:
        return plain.largest_indices(scores, k)
    rest = scores.detach().clamp(min=torch.finfo(scores.dtype).min)  # above what is taken already
    places = [rest.max(-1, keepdim=True).indices]
    for _ in range(k - 1):
        rest.scatter_(1, places[-1], -torch.inf)
        places.append(rest.max(-1, keepdim=True).indices)
    return torch.cat(places, dim=1)


def apply_experts(
    rows: Float[Tensor, "R D"],
    gate_up: Float[Tensor, "E twoF D"],
    down: Float[Tensor, "E D F"],
    segment_ends: Int[Tensor, "E"],
) -> Float[Tensor, "R D"]:
    """Apply expert e to the rows of segment e; rows beyond the last come back undefined.

    CPU only: reading ``segment_ends`` on the host is free there, but would stall a GPU.

    Args:
        rows: what the experts read; products run in their type.
        gate_up: the weights, in that type or in float32.
        down: beside them.
        segment_ends: where each expert's rows end.
    """
    return gradients.apply(_Experts, rows, gate_up, down, segment_ends)


class _Experts(torch.autograd.Function):
    """Makes one expert's product after another, each in its place, and does not keep silu(gate) · up.

    What lies between the products is done for a group of experts at once, whose rows stay in the cache: of few rows,
    calls take longer than arithmetic. A CPU's grouped_mm makes every expert's products apart and joins them, which
    leaves the heap full of holes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, segment_ends: Tensor) -> Tensor:
        ctx.groups = _groups(segment_ends, gate_up.shape[1])
        hidden, y = rows.new_empty(len(rows), gate_up.shape[1]), rows.new_empty(len(rows), down.shape[1])
        for group in ctx.groups:
            _multiply(group.split(rows), group.take(gate_up.mT), group.split(hidden))
            activated = _swiglu_forward(hidden[group.rows])
            _multiply(activated.split(group.lengths), group.take(down.mT), group.split(y))
        ctx.save_for_backward(rows, gate_up, down, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        rows, gate_up, down, hidden = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_gate_up, grad_down = (
            torch.empty_like(x) if any(ctx.needs_input_grad[1:3]) else None for x in (gate_up, down)
        )
        for group in ctx.groups:
            upstream = group.split(grad)
            grad_activated = rows.new_empty(sum(group.lengths), down.shape[2])
            _multiply(upstream, group.take(down), grad_activated.split(group.lengths))
            grad_hidden, activated = _swiglu_backward(grad_activated, hidden[group.rows])
            parts = grad_hidden.split(group.lengths)
            if grad_gate_up is not None and grad_down is not None:  # else the experts are frozen
                _multiply([x.t() for x in upstream], activated.split(group.lengths), group.take(grad_down))
                _multiply([part.t() for part in parts], group.split(rows), group.take(grad_gate_up))
            _multiply(parts, group.take(gate_up), group.split(grad_rows))
        return grad_rows, grad_gate_up, grad_down, None


class _Group(NamedTuple):
    """Experts that follow each other."""

    experts: slice
    rows: slice
    lengths: list[int]
    """How many rows each has."""

    def take(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Return each expert's weights."""
        return weights[self.experts].unbind()

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return each expert's rows."""
        return rows[self.rows].split(self.lengths)


def _groups(segment_ends: Tensor, width: int) -> list[_Group]:
    """Return groups of experts that have at most ``_NUMBERS_AT_ONCE`` numbers between the products, or one expert."""
    ends, groups, first = segment_ends.tolist(), [], 0
    for expert in range(1, len(ends) + 1):
        start = ends[first - 1] if first else 0
        if expert == len(ends) or (ends[expert] - start) * width > _NUMBERS_AT_ONCE:
            bounds = [start, *ends[first:expert]]
            lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
            groups.append(_Group(slice(first, expert), slice(start, bounds[-1]), lengths))
            first = expert
    return groups


def _multiply(a: Sequence[Tensor], b: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """Write one product of matrices after another; a weight, or its gradient, may be wider than what it meets.

    It is cast when its expert's turn comes, while it is in the cache.
    """
    for left, right, place in zip(a, b, places, strict=True):
        if place.dtype == left.dtype:
            torch.mm(left, right.to(left.dtype), out=place)
        else:
            place.copy_(torch.mm(left, right))


def are_few(expert_indices: Int[Tensor, "N K"]) -> bool:
    """Whether so few tokens are routed, without gradients, that sorting would take longer than their experts."""
    is_decoding = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return is_decoding and expert_indices.numel() <= _FEW_ASSIGNMENTS


def mix_few_tokens(
    x: Float[Tensor, "N D"],
    expert_indices: Int[Tensor, "N K"],
    expert_weights: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E twoF D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Return ``plain.mix_experts`` of a few tokens, without gradients, visiting only the experts that were chosen."""
    if len(x) == 1:  # one token: skip the sorting below, which would take longer than its experts
        answers = [_answer(x, gate_up[expert], down[expert]) for expert in expert_indices[0].tolist()]
        return expert_weights @ torch.cat(answers).to(expert_weights.dtype)
    expert_of = expert_indices.flatten().tolist()  # of each assignment
    order = sorted(range(len(expert_of)), key=expert_of.__getitem__)
    assignments = torch.tensor(order)
    token_of_row = assignments // expert_indices.shape[1]
    groups = [(expert, len(list(group))) for expert, group in groupby(order, key=expert_of.__getitem__)]
    parts = x.index_select(0, token_of_row).split([n_rows for _, n_rows in groups])
    answers = [_answer(part, gate_up[expert], down[expert]) for part, (expert, _) in zip(parts, groups, strict=True)]
    weighted = torch.cat(answers) * expert_weights.flatten()[assignments, None]
    return torch.zeros_like(weighted[: len(x)]).index_add_(0, token_of_row, weighted)


def _answer(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return one expert's answer to some tokens."""
    product = multiply_one_row if is_one_row(x) else F.linear
    return product(_swiglu_forward(product(x, gate_up.to(x.dtype))), down.to(x.dtype))


def is_one_row(x: Float[Tensor, "*batch D"]) -> bool:
    """Whether x is one row in float32, without gradients, on a CPU: a token that is decoded."""
    is_small = x.numel() == x.shape[-1] and x.dtype == torch.float32 and x.device.type == "cpu"
    return is_small and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def multiply_one_row(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "F D"]) -> Float[Tensor, "*batch F"]:
    """Return ``F.linear`` of one row. A sum of products reads weights from memory up to twice as fast as MKL does."""
    return (weight * x.reshape(-1)).sum(-1).view(*x.shape[:-1], -1)
