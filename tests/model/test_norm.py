"""RMSNorm at its limits; tests/ops has its ways."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from moe_gpt.model.norm import RMSNorm


def test_norm_of_tiny_and_huge_rows():
    """Eps keeps a row of zeros finite, and a large row has mean square 1."""
    layer, x = RMSNorm(8, 1e-5), torch.zeros(2, 8)
    x[1] = 1e15
    y = layer(x.requires_grad_())
    assert torch.equal(y[0], torch.zeros(8))
    assert_close(y[1].square().mean(), torch.tensor(1.0))
    y.sum().backward()
    assert x.grad.isfinite().all()
