"""The feed-forward networks: one SwiGLU (arXiv 2002.05202), or E of them in stacked weights.

Stacked weights keep every expert in the graph, so one that no token chose gets a zero gradient, not None.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_gpt.config import ModelConfig
from moe_gpt.model.paths import by_hand, fits_grouped_mm, takes_gradients_by_hand


def swiglu(gate_up: Float[Tensor, "*batch gate_and_up"]) -> Float[Tensor, "*batch gate_and_up//2"]:
    """Return silu(gate) * up, where the last dimension holds the gate's F values and then the up projection's."""
    if takes_gradients_by_hand(gate_up):
        return by_hand(_SwiGLU, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """The same with both gradients written into one buffer: autograd would build halves and join them."""

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

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return down(silu(gate(x)) * up(x))."""
        return self.down(swiglu(self.gate_up(x)))


class Experts(nn.Module):
    """E SwiGLU networks applied to contiguous segments of rows.

    ``gate_up`` (E, 2F, D) holds the gate's rows above the up projection's; ``down`` is (E, D, F).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.n_experts, 2 * config.d_ff, config.d_model))
        self.down = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_ff))

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=residual_std)

    def one(self, x: Float[Tensor, "n D"], index: int) -> Float[Tensor, "n D"]:
        """Apply one expert."""
        gate_up, down = self.gate_up[index].to(x.dtype), self.down[index].to(x.dtype)
        return F.linear(swiglu(F.linear(x, gate_up)), down)

    def forward(self, rows: Float[Tensor, "R D"], segment_ends: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        """Apply expert e to the rows of segment e.

        Rows beyond the last segment come back undefined. The products run in the type of ``rows``.
        """
        gate_up, down = self.gate_up.to(rows.dtype), self.down.to(rows.dtype)
        if takes_gradients_by_hand(rows):
            return by_hand(_Experts, rows, gate_up, down, segment_ends)
        grouped = grouped_mm if fits_grouped_mm(rows, self.gate_up.shape[1], self.down.shape[2]) else segment_mm
        return grouped(swiglu(grouped(rows, gate_up, segment_ends)), down, segment_ends)


class _Experts(torch.autograd.Function):
    """The same one segment at a time, every product written to its place, and without keeping silu(gate) * up.

    For CPUs, where knowing the segments' ends costs nothing. Everything that happens to a segment happens while it is
    in the cache. A CPU's grouped_mm makes every expert's products apart and joins them, which leaves the heap full of
    holes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, segment_ends: Tensor) -> Tensor:
        ctx.segments = _segments(segment_ends)
        hidden, y = rows.new_empty(len(rows), gate_up.shape[1]), rows.new_empty(len(rows), down.shape[1])
        for segment, gate_up_e, down_e in zip(ctx.segments, gate_up, down, strict=True):
            torch.mm(rows[segment], gate_up_e.t(), out=hidden[segment])
            torch.mm(_swiglu_forward(hidden[segment]), down_e.t(), out=y[segment])
        ctx.save_for_backward(rows, gate_up, down, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, gate_up, down, hidden = ctx.saved_tensors
        grad_rows, grad_gate_up, grad_down = (torch.empty_like(x) for x in (rows, gate_up, down))
        for index, segment in enumerate(ctx.segments):
            grad_hidden, activated = _swiglu_backward(torch.mm(grad[segment], down[index]), hidden[segment])
            torch.mm(grad[segment].t(), activated, out=grad_down[index])
            torch.mm(grad_hidden.t(), rows[segment], out=grad_gate_up[index])
            torch.mm(grad_hidden, gate_up[index], out=grad_rows[segment])
        return grad_rows, grad_gate_up, grad_down, None


def _segments(segment_ends: Tensor) -> list[slice]:
    ends = segment_ends.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def grouped_mm(
    rows: Float[Tensor, "R I"], weights: Float[Tensor, "E O I"], segment_ends: Int[Tensor, "E"]
) -> Float[Tensor, "R O"]:
    """Multiply each segment by its own matrix in one call, without reading ``segment_ends`` on the host."""
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=segment_ends)


def segment_mm(
    rows: Float[Tensor, "R I"], weights: Float[Tensor, "E O I"], segment_ends: Int[Tensor, "E"]
) -> Float[Tensor, "R O"]:
    """Do the same one segment at a time: any size and type, but the host waits to learn the segments' ends."""
    ends = [rows.shape[0]] * len(weights) if rows.is_meta else segment_ends.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)] + [rows.shape[0] - ends[-1]]
    *segments, rest = rows.split(sizes)
    products = [F.linear(segment, weight) for segment, weight in zip(segments, weights.unbind(), strict=True)]
    return torch.cat([*products, rest.new_zeros(rest.shape[0], weights.shape[1])])
