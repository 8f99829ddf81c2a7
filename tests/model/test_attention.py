"""Attention against a naive loop over heads, rotary positions, and the key-value cache."""

import math

import pytest
import torch
from tiny_models import tiny_config
from torch.testing import assert_close

from moe_gpt import ops
from moe_gpt.model.attention import Attention
from moe_gpt.model.cache import KVCache
from moe_gpt.ops import Visible, rotary_angles, rotate

CAUSAL = Visible()


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


@pytest.fixture(params=["plain", "cpu", "cuda"])
def way_to_attend(request):
    """Run the test with every way to attend."""
    with ops.using(request.param):
        yield


@pytest.mark.usefixtures("way_to_attend")
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_equals_a_loop_over_heads(n_kv_heads):
    """Multi-query, grouped-query and multi-head attention are what a loop over heads and positions gives."""
    layer = random_attention(n_kv_heads=n_kv_heads)
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        y, expected = layer(x, rotary_of(7), CAUSAL, None, 0), attention_by_loops(layer, x)
    assert_close(y, expected, atol=2e-5, rtol=1e-4)  # float32 sums of 32 terms of size 3 in another order


def test_attention_width_of_heads_need_not_divide_the_model():
    """Three heads of width 4 read from and write to a residual stream of width 10."""
    layer = random_attention(d_model=10, n_heads=3, head_dim=4)
    x = torch.randn(1, 5, 10)
    with torch.no_grad():
        y, expected = layer(x, rotary_of(5, 4), CAUSAL, None, 0), attention_by_loops(layer, x)
    assert_close(y, expected, atol=2e-5, rtol=1e-4)  # float32 sums in another order


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
    results = [layer(x, rotary_of(9), CAUSAL, None, 0) for layer in (shared, full)]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
    assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)  # float32 sums in another order
    assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-4)  # gradients of size 100


def test_visible_by_hand():
    """Two queries after two cached positions see three and four; documents and padding take away what is not theirs."""
    cpu = torch.device("cpu")
    assert Visible(past=2).matrix(2, cpu)[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    documents = Visible(document_ids=torch.tensor([[5, 5, 7]]))
    assert documents.matrix(3, cpu)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    padded = Visible(valid_mask=torch.tensor([[False, True, True]]))
    assert padded.matrix(3, cpu)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert padded.positions(3, cpu).tolist() == [[0, 0, 1]]
    assert documents.positions(3, cpu).tolist() == [[0, 1, 0]]
    assert Visible(past=2).positions(2, cpu).tolist() == [[2, 3]]


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
    """Positions beyond the capacity raise with both numbers."""
    cache = KVCache(tiny_config(), 1, 5, torch.device("cpu"), torch.float32)
    cache.length = 4
    with pytest.raises(ValueError, match="room for 5 positions, got 6"):
        cache.visible(2)
    assert cache.capacity == 5


def test_kv_cache_of_multi_query_attention_is_n_heads_times_smaller():
    """One key-value head takes a quarter of the memory of four."""
    caches = [KVCache(tiny_config(n_kv_heads=n), 3, 10, torch.device("cpu"), torch.bfloat16) for n in (1, 4)]
    assert caches[1].keys.nbytes == 4 * caches[0].keys.nbytes == 4 * (2 * 3 * 10 * 8 * 2)
    assert caches[0].values.shape == caches[0].keys.shape
