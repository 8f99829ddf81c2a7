"""Which implementation computes what, by device: one function for every such choice in the model.

Every fast path equals the readable one, forward and backward: the tests of each module compare them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

_LONGEST_BY_PRODUCTS = 1024
_LONGEST_BY_MATRIX = 1024
_FEW_ASSIGNMENTS = 16
_FEW_NUMBERS = 1 << 16
_LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}


def takes_gradients_by_hand(x: Tensor) -> bool:
    """Whether elementwise parts take a gradient written by hand that works in place.

    On a CPU, where every pass over memory counts, even without gradients: the same code then just computes. Not for
    the few numbers of a decoded token, where every operation counts. Elsewhere, and for a compiler, the plain
    expression is better: it gets fused.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or x.numel() > _FEW_NUMBERS


def by_hand(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply a function whose gradient is written by hand; without gradients, as when decoding, just compute it."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NothingToSave(), *arguments)


class _NothingToSave:
    def save_for_backward(self, *tensors: Tensor) -> None:
        """Forget them."""


def visits_experts_one_by_one(n_assignments: int, device: torch.device) -> bool:
    """Whether a few tokens are sent to their experts without sorting, which would take longer than the experts.

    On a CPU, where knowing who goes where costs nothing, and without gradients.
    """
    return (
        device.type == "cpu"
        and n_assignments <= _FEW_ASSIGNMENTS
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that autocast would give a matrix product of x."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # the meta device has no autocast
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def attends_by_products(x: Tensor, n_keys: int) -> bool:
    """Whether attention is a few matrix products rather than PyTorch's scaled_dot_product_attention.

    On a CPU up to 1,024 positions: its CPU kernel repeats the shared head and makes small products, which takes 0.9 to
    1.5 times as long with MKL and up to ten times with oneDNN (docs/benchmarks.md); beyond that the memory counts.
    """
    return x.device.type == "cpu" and n_keys <= _LONGEST_BY_PRODUCTS


def keeps_documents_apart_by(seq_len: int, device: torch.device) -> Literal["blocks", "spans", "matrix"]:
    """Return the form of the mask that keeps documents apart.

    On CUDA *blocks* for FlexAttention, on a CPU with long sequences the *spans* of the documents: neither grows with
    the square of the length. Otherwise a *matrix*, B·T² bytes: document by document, short sequences take up to four
    times as long on a CPU, and long ones two thirds of the time (docs/benchmarks.md).
    """
    if device.type == "cuda":
        return "blocks"
    return "spans" if device.type == "cpu" and seq_len > _LONGEST_BY_MATRIX else "matrix"


def compiles_flex_attention(device: torch.device) -> bool:
    """Whether FlexAttention is compiled: uncompiled it works out the matrix of all pairs, which only tests want."""
    return device.type == "cuda"


def fits_grouped_mm(rows: Tensor, *widths: int) -> bool:
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


def segment_alignment(n_assignments: int, n_experts: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of rows at whose multiples every expert's segment starts: a power of two.

    64 where experts have many rows: oneDNN makes and keeps a kernel for every matrix shape, so shapes should recur; a
    GPU's kernels work on tiles. A CPU's float32 products by MKL do not mind the shape: 8 there, and a step of shape S
    takes 4 % less. With fewer rows padding would cost more than it gains, so it is kept to about a sixteenth of them:
    down to 1 on a CPU, and to 8 elsewhere, which grouped_mm needs. A compiler gets a constant: it would compile again
    for every number of rows that gives another result.

    Args:
        n_assignments: tokens times their choices.
        n_experts: among how many.
        device: where the products are computed.
        dtype: of what they multiply.
    """
    if torch.compiler.is_compiling():
        return 16
    is_cpu = device.type == "cpu"
    is_mkl = is_cpu and dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    alignment, smallest = 8 if is_mkl else 64, 1 if is_cpu else 8
    while alignment > smallest and alignment > n_assignments // (8 * n_experts):
        alignment //= 2
    return alignment


def tokens_per_chunk_of_logits(device: torch.device, vocab_size: int) -> int:
    """Return for how many tokens the loss has logits at a time.

    8 MB of them on a CPU, which stay in its caches; 268 MB elsewhere, enough to keep a GPU busy.
    """
    return max(1, _LOGITS_AT_ONCE.get(device.type, 1 << 26) // vocab_size)
