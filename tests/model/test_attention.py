"""Attention against a naive loop over heads, rotary positions, and the key-value cache."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config
from torch.testing import assert_close

from moe_gpt.model import attention, paths
from moe_gpt.model.attention import (
    Attention,
    KVCache,
    attend,
    attend_by_products,
    attend_in_query_blocks,
    causal_mask,
    rotary_angles,
    rotate,
)


def rotary_of(n_positions: int, head_dim: int = 8, theta: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_angles(torch.arange(n_positions)[None], head_dim, theta)


def rotated_by_complex_numbers(vector: torch.Tensor, position: int, theta: float = 10_000.0) -> torch.Tensor:
    """Turn pair i, (vector[i], vector[i + half]), by position · theta^(-2i / width): RoFormer in complex numbers."""
    half = len(vector) // 2
    angles = torch.tensor([position * theta ** (-2 * i / len(vector)) for i in range(half)])
    turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([turned.real, turned.imag])


def attention_by_loops(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Attend with one loop for sequences, one for heads and one for positions."""
    H, G, Dh = layer.n_heads, layer.n_kv_heads, layer.head_dim
    matrices = layer.qkv.weight.split(Dh)  # H for queries, G for keys, G for values
    y = torch.zeros_like(x)
    for b, sequence in enumerate(x):
        for h in range(H):
            group = h // (H // G)
            query_matrix, key_matrix = matrices[h], matrices[H + group]
            queries = [rotated_by_complex_numbers(query_matrix @ token, t) for t, token in enumerate(sequence)]
            keys = torch.stack([rotated_by_complex_numbers(key_matrix @ token, t) for t, token in enumerate(sequence)])
            values = sequence @ matrices[H + G + group].T
            for t, query in enumerate(queries):
                weights = (keys[: t + 1] @ query / math.sqrt(Dh)).softmax(dim=0)
                y[b, t] += layer.out.weight[:, h * Dh : (h + 1) * Dh] @ (weights @ values[: t + 1])
    return y


def random_attention(**changes: object) -> Attention:
    torch.manual_seed(0)
    layer = Attention(tiny_config(**changes))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.fixture(params=["by_products", "by_sdpa"])
def way_to_attend(request, monkeypatch) -> str:
    """Run the test with both ways to attend, whatever the context's length."""
    monkeypatch.setattr(paths, "_LONGEST_BY_PRODUCTS", {"by_products": 10**9, "by_sdpa": 0}[request.param])
    return request.param


@pytest.mark.usefixtures("way_to_attend")
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_equals_a_loop_over_heads(n_kv_heads):
    """Multi-query, grouped-query and multi-head attention are what a loop over heads and positions gives."""
    layer = random_attention(n_kv_heads=n_kv_heads)
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        y, expected = layer(x, rotary_of(7)), attention_by_loops(layer, x)
    assert_close(y, expected, atol=2e-5, rtol=1e-4)  # float32 sums of 32 terms of size 3 in another order


def test_attention_width_of_heads_need_not_divide_the_model():
    """Three heads of width 4 read from and write to a residual stream of width 10."""
    layer = random_attention(d_model=10, n_heads=3, head_dim=4)
    x = torch.randn(1, 5, 10)
    with torch.no_grad():
        y, expected = layer(x, rotary_of(5, 4)), attention_by_loops(layer, x)
    assert_close(y, expected, atol=2e-5, rtol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["none", "one for all", "one per sequence", "one query"])
def test_attend_by_products_equals_scaled_dot_product_attention(n_kv_heads, mask):
    """Both ways to attend agree in output and gradients, for every kind of mask that the model makes."""
    generator = torch.Generator().manual_seed(0)
    T, S = (1, 9) if mask == "one query" else (9, 9)
    queries, keys, values = (
        torch.randn(3, heads, length, 8, generator=generator, requires_grad=True)
        for heads, length in ((4, T), (n_kv_heads, S), (n_kv_heads, S))
    )
    visible = causal_mask(T, S, torch.device("cpu"))[None, None]
    if mask == "one per sequence":
        visible = visible & (torch.arange(S) >= torch.tensor([0, 2, 5])[:, None, None, None]) | torch.eye(S).bool()
    y = attend_by_products(queries, keys, values, None if mask == "none" else visible)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=True)
    assert_close(y, expected, atol=1e-5, rtol=1e-4)  # float32 sums in another order
    upstream = torch.randn(y.shape, generator=generator)
    gradients = [torch.autograd.grad(result, [queries, keys, values], upstream) for result in (y, expected)]
    assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_from_one_position_sees_all_keys(n_kv_heads, dtype):
    """As decoding asks, with keys that are a slice of a cache: heads that share keys do not mix."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 4, 1, 8, generator=generator).to(dtype)
    keys, values = (torch.randn(3, n_kv_heads, 20, 8, generator=generator).to(dtype)[:, :, :9] for _ in range(2))
    y = attend(queries, keys, values, mask=None)
    expected = attend_by_products(queries, keys, values, torch.ones(1, 1, 1, 9, dtype=torch.bool))
    assert_close(y, expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=1e-4)


def test_attend_takes_products_on_a_cpu_up_to_the_stated_length(monkeypatch):
    """Contexts of up to 1,024 positions are attended by matrix products, longer ones by PyTorch's kernel."""
    lengths = []

    def in_blocks(queries, keys, values):
        lengths.append(keys.shape[2])
        return attend_in_query_blocks(queries, keys, values)

    monkeypatch.setattr(attention, "attend_in_query_blocks", in_blocks)
    for length in (8, 1024, 1025):
        attend(*(torch.zeros(1, 1, length, 2) for _ in range(3)), mask=None)
    assert lengths == [8, 1024]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attend_in_query_blocks_equals_scaled_dot_product_attention(n_kv_heads, length, dtype):
    """Output and gradients, for lengths around a block's, for views as the model passes them."""
    generator = torch.Generator().manual_seed(length)
    heads = torch.randn(3, length, 4 + 2 * n_kv_heads, 8, generator=generator, dtype=dtype, requires_grad=True)
    qkv = [part.transpose(1, 2) for part in heads.split([4, n_kv_heads, n_kv_heads], dim=2)]
    upstream = torch.randn(3, 4, length, 8, generator=generator, dtype=dtype)
    exact = [part.double() for part in qkv]
    results = []
    for y in (
        attend_in_query_blocks(*qkv),
        F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True),
    ):
        (gradient,) = torch.autograd.grad(y, heads, upstream.to(y.dtype), retain_graph=True)
        results.append((y.double(), gradient.double()))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 6e-2}[dtype]  # softmax in float32 or more
    assert_close(results[0], results[1], atol=tolerance, rtol=tolerance)


def test_gradient_of_query_blocks_by_differences():
    """In float64 the gradient written by hand is that of finite differences."""
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(1, heads, 70, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (2, 1, 1)
    ]
    assert torch.autograd.gradcheck(attend_in_query_blocks, qkv, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_by_hand_equals_the_expression(dtype, monkeypatch):
    """Output and gradient; of the first heads of a larger tensor, as in the model."""
    x = torch.randn(2, 5, 4, 8, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 5, 3, 8, dtype=dtype)
    results = []
    for by_hand in (True, False):
        monkeypatch.setattr(attention, "takes_gradients_by_hand", lambda _, choice=by_hand: choice)
        y = rotate(x[:, :, :3], *rotary_of(5))
        results.append((y, *torch.autograd.grad(y, x, upstream)))
    assert_close(results[0], results[1], atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-5)


@pytest.mark.usefixtures("way_to_attend")
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_shared_heads_equal_full_heads_with_copied_weights(n_kv_heads):
    """Sharing a key-value head is having copies of it, in output and in the gradient of the input."""
    shared, full = random_attention(n_kv_heads=n_kv_heads), random_attention(n_kv_heads=4)
    queries, keys, values = shared.qkv.weight.detach().split([32, 8 * n_kv_heads, 8 * n_kv_heads])
    copies = [heads.unflatten(0, (n_kv_heads, 8)).repeat_interleave(4 // n_kv_heads, dim=0) for heads in (keys, values)]
    full.qkv.weight.data = torch.cat([queries, *(heads.flatten(0, 1) for heads in copies)])
    full.out.weight.data = shared.out.weight.detach()
    x = torch.randn(2, 9, 32, requires_grad=True)
    results = [layer(x, rotary_of(9)) for layer in (shared, full)]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
    assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)  # float32 sums in another order
    assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-4)  # gradients of size 100


@pytest.mark.usefixtures("way_to_attend")
@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_attention_without_a_mask_is_causal(n_kv_heads):
    """No mask means the causal mask among the positions of x."""
    layer = random_attention(n_kv_heads=n_kv_heads)
    x = torch.randn(2, 6, 32)
    mask = torch.ones(6, 6).tril().bool()[None, None]
    assert_close(layer(x, rotary_of(6)), layer(x, rotary_of(6), mask), atol=1e-5, rtol=1e-4)  # other kernels


def test_causal_mask_by_hand():
    """Two queries that are the last of four positions see the first three, and all four."""
    mask = causal_mask(2, 4, torch.device("cpu"))
    assert mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_rotate_turns_pairs_by_hand():
    """Width 4, theta 100: the pair (0, 2) turns by the position, the pair (1, 3) by a tenth of it."""
    cos, sin = rotary_of(3, head_dim=4, theta=100.0)
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 3, 1, 4), cos, sin)
    expected = [[math.cos(p), -2 * math.sin(p / 10), math.sin(p), 2 * math.cos(p / 10)] for p in range(3)]
    assert_close(turned[0, :, 0], torch.tensor(expected), atol=1e-6, rtol=0)  # float32 rounding


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_rotary_scores_depend_on_the_distance_only(shift):
    """Moving query and key by the same number of positions changes no score."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 6, 2, 8, generator=generator) for _ in range(2))

    def scores(first):
        angles = rotary_angles(torch.arange(first, first + 6)[None], 8, 10_000.0)
        return torch.einsum("bthd,bshd->bhts", rotate(queries, *angles), rotate(keys, *angles))

    assert_close(scores(shift), scores(0), atol=1e-3, rtol=0)  # float32 angles near 1000 are good to 6e-5
    unturned = torch.einsum("bthd,bshd->bhts", queries, keys)
    assert (scores(0) - unturned).abs().max() > 0.1


def test_rotate_preserves_norms_and_leaves_position_zero_alone():
    """A rotation changes no length, and the first position is not turned."""
    x = torch.randn(2, 50, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rotary_of(50))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)  # float32 rounding
    assert torch.equal(turned[:, 0], x[:, 0])
    assert (turned[:, 1:] - x[:, 1:]).abs().max() > 1


def test_rotate_computes_in_float32_and_returns_the_type_it_was_given():
    """A bf16 vector is rotated in float32 and rounded once."""
    x = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, *rotary_of(40))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), *rotary_of(40)).bfloat16())


def test_kv_cache_returns_everything_written_so_far():
    """A write returns the layer's positions from the first to the new ones; the length waits for the last layer."""
    cache = KVCache(tiny_config(), 1, 5, torch.device("cpu"), torch.float32)
    first, second = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 1, 8)
    cache.write(1, first, -first)
    assert cache.length == 0
    cache.length = 2
    keys, values = cache.write(1, second, -second)
    assert torch.equal(keys, torch.cat([first, second], dim=2))
    assert torch.equal(values, -keys)
    assert cache.keys[0].abs().max() == 0  # another layer


def test_kv_cache_says_what_does_not_fit():
    """Writing beyond the capacity raises with both numbers."""
    cache = KVCache(tiny_config(), 1, 5, torch.device("cpu"), torch.float32)
    cache.length = 4
    with pytest.raises(ValueError, match="room for 5 positions, got 6"):
        cache.write(0, torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))
    assert cache.capacity == 5


def test_kv_cache_of_multi_query_attention_is_n_heads_times_smaller():
    """One key-value head takes a quarter of the memory of four."""
    caches = [KVCache(tiny_config(n_kv_heads=n), 3, 10, torch.device("cpu"), torch.bfloat16) for n in (1, 4)]
    assert caches[1].keys.nbytes == 4 * caches[0].keys.nbytes == 4 * (2 * 3 * 10 * 8 * 2)
    assert caches[0].values.shape == caches[0].keys.shape
