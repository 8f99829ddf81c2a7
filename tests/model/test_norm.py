"""RMSNorm by hand and by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moe_gpt.model import norm
from moe_gpt.model.norm import RMSNorm


def results(dtype: torch.dtype, by_hand: bool, monkeypatch) -> list[torch.Tensor]:
    """Return output and gradients."""
    monkeypatch.setattr(norm, "takes_gradients_by_hand", lambda _: by_hand)
    torch.manual_seed(0)
    layer = RMSNorm(24, 1e-5)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, layer.weight], torch.randn_like(y))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_by_hand_equals_pytorchs(dtype, monkeypatch):
    """Output, and gradients of input and weight; the output keeps its type."""
    ours, theirs = (results(dtype, by_hand, monkeypatch) for by_hand in (True, False))
    assert ours[0].dtype == dtype
    assert_close(ours, theirs, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5)


def test_norm_of_tiny_and_huge_rows():
    """Eps keeps a row of zeros finite, and a large row has mean square 1."""
    layer, x = RMSNorm(8, 1e-5), torch.zeros(2, 8)
    x[1] = 1e15
    y = layer(x.requires_grad_())
    assert torch.equal(y[0], torch.zeros(8))
    assert_close(y[1].square().mean(), torch.tensor(1.0))
    y.sum().backward()
    assert x.grad.isfinite().all()
