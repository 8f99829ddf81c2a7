"""The GPU's fast paths give what the CPU gives. Run with: pytest -m gpu."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_gpt.config import ModelConfig
from moe_gpt.model.losses import cross_entropy
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import autocast

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(vocab_size=256, n_layers=2, d_model=64, n_heads=2, head_dim=32, d_ff=64, n_experts=8)


def losses_and_gradients(config: ModelConfig, device: str, precision: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = MoEGPT(config).to(device)
    tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1)).to(device)
    with autocast(torch.device(device), precision):
        logits, stats = model(tokens[:, :-1])
    ce = cross_entropy(logits, tokens[:, 1:])
    loss = ce.total / ce.n_valid
    (loss + stats.load_balancing_loss.mean()).backward()
    return loss.cpu(), [parameter.grad.cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_gpu_in_float32_equals_cpu(n_kv_heads):
    """Loss and gradients agree to float32 rounding over two devices' summation orders."""
    config = dataclasses.replace(CONFIG, n_kv_heads=n_kv_heads)
    cpu, gpu = (losses_and_gradients(config, device, "fp32") for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)


def test_gpu_in_bf16_is_close_to_cpu():
    """bf16 products change the loss by less than their relative precision of 2^-8."""
    cpu, gpu = losses_and_gradients(CONFIG, "cpu", "fp32")[0], losses_and_gradients(CONFIG, "cuda", "bf16")[0]
    torch.testing.assert_close(gpu, cpu, rtol=4e-3, atol=0)
