"""The experts' matrix products against a readable loop, forward and backward, and against each other."""

import pytest
import torch
import torch.nn.functional as F
from expert_loop import moe_by_loop, parameters_for_loop
from tiny_models import random_layer, tiny_config
from torch.testing import assert_close

from moe_gpt import ops
from moe_gpt.model.experts import Experts, FeedForward
from moe_gpt.model.losses import router_stats
from moe_gpt.ops.cuda import fits_grouped_mm, grouped_mm, segment_mm

PATHS = {"grouped_mm": {"d_model": 32, "d_ff": 16}, "segment_mm": {"d_model": 30, "d_ff": 13}}
"""Sizes that take each of the two ways to multiply, in float32 on a CPU."""


@pytest.mark.parametrize(("path", "fits"), [("grouped_mm", True), ("segment_mm", False)])
def test_grouped_mm_fits_rows_of_whole_sixteen_bytes(path, fits):
    """The two sizes of these tests really take the two paths."""
    sizes = PATHS[path]
    assert fits_grouped_mm(torch.zeros(4, sizes["d_model"]), 2 * sizes["d_ff"], sizes["d_ff"]) is fits


@pytest.mark.parametrize("way", ["plain", "cpu", "cuda"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "routing",
    [
        {"top_k": 1, "normalize_topk": False},
        {"top_k": 2},
        {"top_k": 2, "normalize_topk": False},
        {"top_k": 4},
        {"top_k": 2, "n_experts": 9},
    ],
    ids=lambda routing: "-".join(f"{key}={value}" for key, value in routing.items()),
)
def test_moe_equals_the_loop_over_experts(path, routing, way):
    """Output and the gradients of input, router and experts are those of a plain loop over experts."""
    layer = random_layer(**PATHS[path], **routing)
    x = torch.randn(3, 17, PATHS[path]["d_model"], requires_grad=True)
    upstream = torch.randn_like(x)
    with ops.using(way):
        y, _ = layer(x)
        y.backward(upstream)

    tokens, weights = x.detach().flatten(0, 1).requires_grad_(), parameters_for_loop(layer)
    expected = moe_by_loop(tokens, **weights, top_k=layer.router.top_k, normalize_topk=layer.router.normalize_topk)
    expected.backward(upstream.flatten(0, 1))
    close = {"atol": 2e-5, "rtol": 1e-4}  # float32: sums of some 50 terms of size 1 in another order
    assert_close(y.flatten(0, 1), expected, **close)
    assert_close(x.grad.flatten(0, 1), tokens.grad, **close)
    assert_close(layer.router.weight.grad, weights["router_weight"].grad, **close)
    assert_close(layer.experts.gate_up.grad, weights["gate_up"].grad, **close)
    assert_close(layer.experts.down.grad, weights["down"].grad, **close)


@pytest.mark.parametrize("path", PATHS)
def test_moe_gives_starved_experts_zero_gradients(path):
    """Experts that no token chose get gradients of zeros, not None; the chosen ones get others."""
    layer = random_layer(**PATHS[path])
    with torch.no_grad():
        layer.router.weight.zero_()  # ties: every token goes to experts 0 and 1
    y, routing = layer(torch.randn(2, 10, PATHS[path]["d_model"]))
    y.square().sum().backward()
    assert router_stats([routing]).tokens_per_expert.tolist() == [[20, 20, 0, 0]]
    for weight in (layer.experts.gate_up, layer.experts.down):
        assert weight.grad[2:].abs().max() == 0
        assert weight.grad[:2].flatten(1).norm(dim=1).min() > 0


def products_and_gradients(multiply, rows, weights, ends, n_used):
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    product = multiply(rows, weights, ends)[:n_used]
    product.square().sum().backward()
    return product, rows.grad[:n_used], weights.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[8, 16, 24], [0, 40, 8], [5, 0, 0], [3, 17, 1]], ids=str)
def test_grouped_mm_equals_segment_mm(sizes, dtype):
    """Both ways to multiply agree, forward and backward, also where segments are empty or rows are left over."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(56, 16, generator=generator).to(dtype)
    weights = torch.randn(3, 8, 16, generator=generator).to(dtype)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    one = products_and_gradients(grouped_mm, rows, weights, ends, sum(sizes))
    other = products_and_gradients(segment_mm, rows, weights, ends, sum(sizes))
    # rounding of the type: 8 bits of mantissa in bf16; entries are sums of up to 40 products
    close = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.02}
    for actual, expected in zip(one, other, strict=True):
        assert_close(actual, expected, **close)


def test_segment_mm_by_hand():
    """Segment 0 is multiplied by 2, segment 1 is empty, segment 2 is multiplied by 5."""
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    product = segment_mm(rows, torch.tensor([[[2.0]], [[3.0]], [[5.0]]]), torch.tensor([1, 1, 3], dtype=torch.int32))
    assert product[:3].flatten().tolist() == [2, 10, 15]
    assert product.shape == (4, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feed_forward_is_swiglu(dtype):
    """FeedForward is down(silu(gate) * up), the gate's rows above the up projection's, with its gradients."""
    torch.manual_seed(0)
    network = FeedForward(tiny_config()).to(dtype)
    x = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
    copies = [tensor.detach().clone().requires_grad_() for tensor in (x, network.gate_up.weight, network.down.weight)]
    gate, up = copies[1][:16], copies[1][16:]
    expected = (F.silu(copies[0] @ gate.T) * (copies[0] @ up.T)) @ copies[2].T
    y, _ = network(x)
    assert_close(y, expected, atol=1e-6, rtol=1e-5)  # float32 rounding
    upstream = torch.randn_like(y)
    actual = torch.autograd.grad(y, [x, network.gate_up.weight, network.down.weight], upstream)
    for gradient, wanted in zip(actual, torch.autograd.grad(expected, copies, upstream), strict=True):
        assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)  # float32 sums of 14 terms


@pytest.mark.parametrize("path", PATHS)
def test_one_expert_is_the_dense_feed_forward(path):
    """One expert with weight 1 is FeedForward with the same two matrices."""
    torch.manual_seed(0)
    network = FeedForward(tiny_config(**PATHS[path]))
    experts = Experts(tiny_config(n_experts=1, top_k=1, **PATHS[path]))
    experts.load_state_dict(
        {"gate_up": network.gate_up.weight.detach()[None], "down": network.down.weight.detach()[None]}
    )
    x = torch.randn(9, PATHS[path]["d_model"])
    only = torch.zeros(9, 1, dtype=torch.int64)
    answers = ops.mix_experts(x, only, torch.ones(9, 1), experts.gate_up, experts.down)
    assert_close(answers, network(x)[0], atol=1e-5, rtol=1e-5)  # float32 sums in another order
