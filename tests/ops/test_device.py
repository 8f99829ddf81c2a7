"""Choices that depend on the device."""

from __future__ import annotations

import platform

import pytest
import torch

from moe_gpt.errors import InputError
from moe_gpt.ops import device as device_module
from moe_gpt.ops.device import autocast, available_memory_bytes, pick_device, pick_precision, tune_process

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("AMD EPYC 9755", {"avx512_bf16": True}, "bf16"),
        ("Intel Xeon", {"avx512_bf16": True}, "fp32"),
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ("AMD EPYC 7763", {}, "fp32"),
    ],
)
def test_auto_precision_is_bf16_where_a_cpu_is_fast_in_it(monkeypatch, name, flags, expected):
    """AMX, or AVX512-BF16 on a CPU that is not Intel's without AMX."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, **flags}, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert pick_precision("auto", CPU) == pick_precision("auto", CPU, width=128) == expected
    assert pick_precision("auto", CPU, width=64) == "fp32"


def test_auto_precision_is_fp32_where_nothing_is_known(monkeypatch):
    """Without a way to ask the CPU, the safe choice; what was asked for is always obeyed."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", CPU) == "fp32"
    assert pick_precision("bf16", CPU) == "bf16"


def test_autocast_computes_in_bf16_and_keeps_parameters():
    """A linear layer's output is bf16 inside, float32 without; its weight stays float32."""
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with autocast(CPU, "bf16"):
        assert layer(x).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert layer(x).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


def test_tuning_keeps_float32_products_exact():
    """The fast kernel's relative error is that of float32, far below bf16's 4e-3 or tf32's 5e-4."""
    before = torch.get_float32_matmul_precision()
    try:
        tune_process(CPU)
        a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        exact = a.double() @ b.double()
        assert float(((a @ b) - exact).norm() / exact.norm()) < 2e-6
    finally:
        torch.set_float32_matmul_precision(before)


def test_tuning_leaves_amx_machines_at_full_precision(monkeypatch):
    """With AMX, "medium" could round float32 to bf16, so it is not set."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "amx_tile": True}, raising=False)
    called = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", called.append)
    device_module._use_fast_float32()
    assert called == []


def test_pick_device_names_what_is_there():
    """Auto finds a device; an impossible one is an error that lists the possible ones."""
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="'tpu'"):
        pick_device("tpu")
    with pytest.raises(InputError, match=r"'cuda:99' is not there; this machine has cpu"):
        pick_device("cuda:99")


def test_free_memory_is_that_of_the_machine():
    """A positive number below a petabyte on Linux; unknown on a device that does not say."""
    free = available_memory_bytes(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e15
    assert available_memory_bytes(torch.device("meta")) is None
