"""The device to run on, its precision, its memory, and what makes a process fast on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from moe_gpt.errors import InputError
from moe_gpt.ops.spinning import spin_less_when_crowded

Precision = Literal["bf16", "fp32"]
_NARROW = 128


def pick_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` names; auto prefers CUDA, then MPS.

    Raises:
        InputError: where there is no such device.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be one of auto, cpu, cuda, mps, got {name!r}") from None
    available = {"cpu": True, "mps": has_mps, "cuda": has_cuda and (device.index or 0) < torch.cuda.device_count()}
    if not available.get(device.type, False):
        there = ["cpu", *["cuda"] * has_cuda, *["mps"] * has_mps]
        why = ", and this PyTorch is built without CUDA" if device.type == "cuda" and not torch.version.cuda else ""
        raise InputError(f"device {name!r} is not there; this machine has {', '.join(there)}{why}")
    return device


def pick_precision(wanted: str, device: torch.device, width: int = _NARROW) -> Precision:
    """Return the compute type of the matrix products of a model of some ``width`` (d_model).

    ``auto`` is bf16 where the device computes it at least as fast as float32: GPUs with bf16; CPUs with AMX, or
    with AVX512-BF16 except Intel's without AMX, whose bf16 products were measured to take twice the time of their
    float32 ones (docs/benchmarks.md). On a CPU a narrow model takes float32: its products are too small to gain.
    """
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        return "bf16" if width >= _NARROW and _cpu_is_fast_in_bf16() else "fp32"
    return "fp32"


def _cpu_is_fast_in_bf16() -> bool:
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is None or platform.machine() not in ("x86_64", "AMD64"):
        return False
    capabilities = get_capabilities()
    has_amx = bool(capabilities.get("amx_bf16"))
    return has_amx or (bool(capabilities.get("avx512_bf16")) and not _is_intel(capabilities))


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass computes in ``precision``; parameters stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def tune_process(device: torch.device, deterministic: bool = False) -> None:
    """Set, for the whole process, what makes a CPU fast, and whether operations may vary from run to run.

    Args:
        device: where to compute.
        deterministic: refuse operations that do not repeat their own bits. A CPU's do with the same number of
            threads; some of CUDA's have a slower deterministic form, which this selects.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.backends.cudnn.benchmark = False
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports the compiler, for seconds
        torch.use_deterministic_algorithms(deterministic)
    if device.type == "cpu":
        _use_fast_float32()
        _keep_freed_memory()
        spin_less_when_crowded()


def _use_fast_float32() -> None:
    """Let float32 products take their fastest kernel that is still float32.

    "medium" selects oneDNN's AVX-512 kernel, which is as exact as the default, MKL's (relative error 6e-7). On CPUs
    that are not Intel's it takes half the time; on Intel's MKL is the faster, 2.5 times so for single tokens
    (docs/benchmarks.md), and with AMX "medium" would round to bf16: there the default stays.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is None:
        return
    capabilities = get_capabilities()
    if capabilities.get("avx512_f") and not capabilities.get("amx_tile") and not _is_intel(capabilities):
        torch.set_float32_matmul_precision("medium")


@contextlib.contextmanager
def small_products(device: torch.device) -> Iterator[None]:
    """Take the kernels of small products within the block, on a CPU.

    oneDNN's, which ``tune_process`` may select, prepare each new shape: of few rows that takes longer than the product.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_intel(capabilities: Mapping[str, Any]) -> bool:
    return "intel" in str(capabilities.get("cpu_name", "")).lower()


def _keep_freed_memory() -> None:
    """Keep large freed buffers in the process: glibc would return and fault them in again at every step."""
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def describe_device(device: torch.device) -> str:
    """Return the device's name and how much of it there is."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_memory_bytes(device: torch.device) -> int | None:
    """Return the memory of the device that is free; on a CPU what can be had without swapping; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that autocast would give a matrix product of x."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # the meta device has no autocast
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Return the context in which operations on ``x`` keep the types that they are given."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def without_compiler() -> contextlib.AbstractContextManager:
    """Return the context in which compiled modules run uncompiled.

    PyTorch's compiler takes seconds to import: where nobody has imported it, nothing is compiled.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
