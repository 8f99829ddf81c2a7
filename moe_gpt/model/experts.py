"""The feed-forward networks: one SwiGLU (arXiv 2002.05202), or E of them in stacked weights.

Stacked weights keep every expert in the graph, so one that no token chose gets a zero gradient, not None.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_gpt.config import ModelConfig


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up with both gradients written into one buffer: autograd would build halves and join them."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        grad_up.copy_(grad * F.silu(gate))
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grad_gate_up


def swiglu(gate_up: Float[Tensor, "*batch gate_and_up"]) -> Float[Tensor, "*batch gate_and_up//2"]:
    """Return silu(gate) * up, where the last dimension holds the gate's F values and then the up projection's."""
    return _SwiGLU.apply(gate_up)


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

    def forward(self, rows: Float[Tensor, "R D"], segment_ends: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        """Apply expert e to the rows of segment e.

        Rows beyond the last segment come back undefined. The products run in the type of ``rows``.
        """
        gate_up, down = self.gate_up.to(rows.dtype), self.down.to(rows.dtype)
        grouped = grouped_mm if grouped_mm_fits(rows, self.gate_up.shape[1], self.down.shape[2]) else segment_mm
        return grouped(swiglu(grouped(rows, gate_up, segment_ends)), down, segment_ends)


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


def grouped_mm_fits(rows: Tensor, *widths: int) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these rows.

    It wants rows whose length is a multiple of 16 bytes; bf16 on CUDA devices of compute capability 8.0 and newer;
    bf16 or float32 on CPUs, but only bf16 when compiled (it has no float32 meta kernel).
    """
    if any(width * rows.element_size() % 16 for width in (rows.shape[1], *widths)):
        return False
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    if rows.device.type == "cpu":
        return rows.dtype == torch.bfloat16 or (rows.dtype == torch.float32 and not torch.compiler.is_compiling())
    return False
