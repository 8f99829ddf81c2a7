"""Weights in 8 or 4 bits: less memory, and less to read for each decoded token.

Quantised are the matrices of attention and of the feed-forward networks, all experts included. Router, norms, embedding
and output matrix keep their type: the loss is more sensitive to them. Products with a quantised matrix round what they
read and give to bfloat16, whatever the model's own type is. The formats are those of PyTorch's kernels for CPUs:

- ``int8``: w = scale · q, with a scale for each row of a matrix (arXiv 2208.07339).
- ``int4``: w = scale · (q - 8) + zero, with both for each group of 32 numbers of a row (arXiv 1909.05840).

A model of the kind int4 has only gate_up, two thirds of an expert, in 4 bits, the rest in 8: with all in 4 bits, the
loss rises by more than four times as much (docs/quantised.md).
"""

from __future__ import annotations

import functools
import re

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.errors import InputError, shown
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops import dispatch, plain

KINDS = ("int8", "int4")
GROUP, _ROWS = 32, 64  # kernels read whole blocks, some without a check: matrices get zeros up to multiples
_NAMES = re.compile(r"blocks\.\d+\.(attention\.(qkv|out)\.weight|feed_forward\.(experts\.)?(gate_up|down)(\.weight)?)")


def round_weight(weight: Float[Tensor, "*E F D"], kind: str) -> tuple[Tensor, Tensor]:
    """Return the nearest numbers of a format, and their bfloat16 scales, as files hold them, whatever the machine.

    D is filled with zeros to a multiple of 32 first. For int8, numbers are int8 (*E, F, D) and scales (*E, F). For
    int4, numbers are uint8 (*E, F, D/2), even columns in the low halves, and scales (*E, F, D/32, 2), with zeros.
    """
    weight = F.pad(weight.float(), (0, -weight.shape[-1] % GROUP))
    if kind == "int8":
        scales = (weight.abs().amax(-1) / 127).clamp(min=1e-30).bfloat16()
        return (weight / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8), scales
    groups = weight.unflatten(-1, (-1, GROUP))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((most - least) / 15).clamp(min=1e-30).bfloat16().float()
    zero = (least + 8 * scale).bfloat16().float()
    q = ((groups - zero) / scale + 8).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    return q[..., ::2] | q[..., 1::2] << 4, torch.cat([scale, zero], dim=-1).bfloat16()


class Quantised(nn.Module):
    """One or E matrices (F, D) in few bits, in the layout of PyTorch's kernels; each can multiply rows."""

    numbers: Tensor
    scales: Tensor
    few_rows: int
    """Of as many rows at most, a CPU's kernel makes the product; for more, the matrix is restored first."""

    def __init__(self, numbers: Tensor, scales: Tensor, n_columns: int) -> None:
        super().__init__()
        self.kind, self.few_rows = ("int8", 32) if numbers.dtype == torch.int8 else ("int4", 96)
        self.n_matrices, self.n_rows, self.n_columns = numbers.shape[:-2].numel(), numbers.shape[-2], n_columns
        pad = (0, 0, 0, -self.n_rows % _ROWS)
        numbers = F.pad(numbers.reshape(self.n_matrices, self.n_rows, -1), pad)
        scales = F.pad(scales.reshape(self.n_matrices, self.n_rows, -1), pad)
        if self.kind == "int4":
            numbers = _in_blocks(torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(-2), int4_block()[0])
            scales = scales.unflatten(-1, (-1, 2)).transpose(1, 2)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales.contiguous())

    def forward(self, x: Float[Tensor, "*batch D"], matrix: int = 0) -> Float[Tensor, "*batch F"]:
        """Return x Wᵀ, rounded to bfloat16, in x's type."""
        rows = x.reshape(-1, self.n_columns).to(torch.bfloat16)
        rows = F.pad(rows, (0, -self.n_columns % GROUP)) if self.n_columns % GROUP else rows
        if not self._has_kernel(rows):
            y = F.linear(rows, self.restore(matrix))
        elif self.kind == "int8":
            y = torch._weight_int8pack_mm(rows, self.numbers[matrix], self.scales[matrix].view(-1))
        else:
            y = torch._weight_int4pack_mm_for_cpu(rows, self.numbers[matrix], GROUP, self.scales[matrix])
        return y[:, : self.n_rows].reshape(*x.shape[:-1], self.n_rows).to(x.dtype)

    def _has_kernel(self, rows: Tensor) -> bool:
        """Whether a kernel makes the product. The bits of its rows do not depend on each other."""
        is_few = len(rows) <= self.few_rows or ops.is_alone()
        return is_few and rows.device.type == "cpu" and (self.kind == "int8" or int4_block()[1])

    def restore(self, matrix: int = 0) -> Float[Tensor, "rows columns"]:
        """Return a matrix in bfloat16, with the rows and columns that were filled in: what the numbers mean."""
        numbers, scales = self.numbers[matrix], self.scales[matrix]
        if self.kind == "int8":
            return numbers * scales
        block, _ = int4_block()
        packed = numbers.view(-1, 2 * numbers.shape[1], block // 2)
        q = torch.cat([packed & 15, packed >> 4], dim=-1).sub_(8).view(torch.int8)  # (rows/block, columns, block)
        scale, zero = scales.unflatten(1, (-1, block)).transpose(0, 1).unsqueeze(2).unbind(-1)
        weight = torch.addcmul(zero.contiguous(), q.unflatten(1, (-1, GROUP)).to(zero.dtype), scale.contiguous())
        return weight.flatten(1, 2).transpose(0, 1).flatten(1).t()


def _in_blocks(numbers: Int[Tensor, "*E F D"], block: int) -> Int[Tensor, "*E F D/2"]:
    """Put a column of ``block`` rows after another, its first half into the low halves of bytes."""
    low, high = numbers.unflatten(-2, (-1, block)).transpose(-2, -1).chunk(2, dim=-1)
    return (low | high << 4).flatten(-3).view(*numbers.shape[:-1], -1)


@functools.cache
def int4_block() -> tuple[int, bool]:
    """Return the rows of a block of this CPU's int4 kernel, and whether we know them: 64 with AVX-512, 32 with AVX2."""
    probe = torch.randint(16, (_ROWS, GROUP), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack_for_cpu(probe.int(), 1)
    return next(((block, True) for block in (64, 32) if torch.equal(_in_blocks(probe, block), packed)), (64, False))


def mix_experts(
    x: Float[Tensor, "N D"],
    expert_indices: Int[Tensor, "N K"],
    expert_weights: Float[Tensor, "N K"],
    gate_up: Quantised,
    down: Quantised,
) -> Float[Tensor, "N D"]:
    """Return ``plain.mix_experts``; only chosen experts are visited, and a token's answers are added in their order."""
    K, experts = expert_indices.shape[1], expert_indices.flatten()
    order, counts = experts.argsort(stable=True), experts.bincount(minlength=gate_up.n_matrices)
    plan = dispatch.Dispatch(order // K, order.argsort().view_as(expert_indices), counts.cumsum(0))
    parts = x.to(torch.bfloat16)[plan.token_of_row].split(counts.tolist())
    answers = [down(plain.swiglu(gate_up(part, expert)), expert) for expert, part in enumerate(parts) if len(part)]
    return dispatch.combine_rows(torch.cat(answers), expert_weights, plan)


def matrix_kind(name: str, kind: str) -> str | None:
    """Return the format of a parameter in a model of a kind; None where it keeps its type."""
    return ("int4" if kind == "int4" and "gate_up" in name else "int8") if _NAMES.fullmatch(name) else None


def put(model: MoEGPT, name: str, matrices: Quantised) -> None:
    """Replace a parameter, or the linear layer whose weight it is."""
    parent, _, attribute = name.removesuffix(".weight").rpartition(".")
    module = model.get_submodule(parent)
    delattr(module, attribute)
    setattr(module, attribute, matrices)
    if ".experts." in name:
        module.mix = mix_experts  # type: ignore[assignment]


@torch.no_grad()
def quantise(model: MoEGPT, kind: str) -> None:
    """Quantise a model in place, for inference alone; raise ``InputError`` for what cannot become int8 or int4."""
    if kind not in KINDS:
        raise InputError(f"quantize must be int8 or int4, got {shown(kind)}")
    if found := kind_of(model):
        raise InputError(f"quantize={kind}: the weights are {found} already; give the model that they were made from")
    for name, weight in list(model.named_parameters()):
        if format := matrix_kind(name, kind):
            if not weight.isfinite().all():
                raise InputError(f"{name} has values that are not finite")
            put(model, name, Quantised(*round_weight(weight, format), weight.shape[-1]))
    model.eval()


def kind_of(model: nn.Module) -> str | None:
    """Return int8 or int4 where a model is quantised, else None."""
    return min((module.kind for module in model.modules() if isinstance(module, Quantised)), default=None)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
