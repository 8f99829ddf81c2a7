"""Which implementation computes what, by device: one function for every such choice in the model.

Every fast path equals the readable one, forward and backward (tests/model/test_paths.py and the tests of each).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LONGEST_BY_PRODUCTS = 1024
_LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}


def takes_gradients_by_hand(x: Tensor) -> bool:
    """Whether elementwise parts take a gradient written by hand that works in place.

    On a CPU, where every pass over memory counts. Elsewhere, and for a compiler, the plain expression is better: it
    gets fused.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def attends_by_products(x: Tensor, n_keys: int) -> bool:
    """Whether attention is a few matrix products rather than PyTorch's scaled_dot_product_attention.

    On a CPU up to 1,024 positions: its CPU kernel repeats the shared head, and takes up to eight times as long for 64
    positions and 1.2 times for 1,024 (docs/benchmarks.md); beyond that the products' memory counts.
    """
    return x.device.type == "cpu" and n_keys <= _LONGEST_BY_PRODUCTS


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


def tokens_per_chunk_of_logits(device: torch.device, vocab_size: int) -> int:
    """Return for how many tokens the loss has logits at a time.

    8 MB of them on a CPU, which stay in its caches; 268 MB elsewhere, enough to keep a GPU busy.
    """
    return max(1, _LOGITS_AT_ONCE.get(device.type, 1 << 26) // vocab_size)
