"""The layer as a whole: its statistics, dropping by capacity, and padding."""

import pytest
import torch
from tiny_models import random_layer, tiny_config
from torch.testing import assert_close

from moe_gpt.model.losses import RouterStats, router_stats
from moe_gpt.model.moe import MoE, within_capacity


def steered_layer(n_experts: int = 4, **changes: object) -> MoE:
    """Return a layer that sends the unit vector e_i to expert i first (d_model = n_experts)."""
    torch.manual_seed(0)
    settings = {"n_experts": n_experts, "d_model": n_experts, "top_k": 1, "normalize_topk": False}
    layer = MoE(tiny_config(**(settings | changes)))
    torch.nn.init.normal_(layer.experts.gate_up)
    torch.nn.init.normal_(layer.experts.down)
    with torch.no_grad():
        layer.router.weight.copy_(4 * torch.eye(n_experts))
    return layer


def run(layer: MoE, x: torch.Tensor, valid_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, RouterStats]:
    """Return the layer's output and the statistics of this one layer, as the model makes them."""
    y, routing = layer(x, valid_mask)
    stats = router_stats([routing], valid_mask, layer.capacity_ratio if layer.training else None)
    return y, RouterStats(*(value[0] for value in stats))


def tokens_for(experts: list[int], n_experts: int = 4) -> torch.Tensor:
    """Return one sequence (1, T, D) whose tokens choose these experts."""
    return torch.eye(n_experts)[torch.tensor(experts)][None]


def test_moe_drops_beyond_capacity_by_hand():
    """Eight tokens, four experts, factor 1: two slots each; the third and fourth token of expert 0 get nothing."""
    layer = steered_layer(capacity_factor=1.0)
    x = tokens_for([0, 0, 0, 1, 0, 2, 3, 3])
    y, stats = run(layer, x)
    kept, _ = layer.eval()(x)
    dropped = [2, 4]
    assert stats.dropped_assignments == len(dropped)
    assert y[0, dropped].abs().max() == 0
    others = [0, 1, 3, 5, 6, 7]
    assert_close(y[0, others], kept[0, others], atol=0, rtol=0)  # the same operations on the same rows
    assert kept[0, dropped].abs().max() > 0


@pytest.mark.parametrize(
    ("capacity_factor", "n_experts", "n_tokens", "expert_capacity"),
    [(1.0, 4, 10, 3), (0.5, 4, 8, 1), (2.0, 4, 8, 4), (1.1, 10, 100, 11), (0.01, 4, 8, 1)],
)
def test_moe_capacity_is_the_factor_times_the_even_share_rounded_up(
    capacity_factor, n_experts, n_tokens, expert_capacity
):
    """An expert has ceil(capacity_factor · N · K / E) slots; 1.1 of an even share of 10 is 11."""
    layer = steered_layer(n_experts, capacity_factor=capacity_factor)
    _, stats = run(layer, tokens_for([0] * n_tokens, n_experts))
    assert stats.dropped_assignments == n_tokens - expert_capacity


def test_moe_capacity_grows_with_top_k():
    """With two choices per token there are twice as many assignments and twice as many slots."""
    layer = steered_layer(top_k=2, capacity_factor=1.0)
    with torch.no_grad():
        layer.router.weight.zero_()  # ties: every token goes to experts 0 and 1
    _, stats = run(layer, tokens_for([0] * 8))
    assert stats.dropped_assignments == 2 * (8 - 4)


def test_moe_drops_in_training_only():
    """Evaluation answers every token whatever the capacity factor, as a layer without one does."""
    layer, dropless = random_layer(capacity_factor=0.3), random_layer()
    x = torch.randn(2, 20, 32)
    _, training_stats = run(layer, x)
    assert training_stats.dropped_assignments > 0
    y, stats = run(layer.eval(), x)
    assert stats.dropped_assignments == 0
    assert_close(y, dropless(x)[0], atol=0, rtol=0)  # the same operations


def test_moe_without_capacity_factor_drops_nothing_in_training():
    """Dropless by default, even when every token wants the same expert."""
    y, stats = run(steered_layer(), tokens_for([0] * 50))
    assert stats.dropped_assignments == 0
    assert y.norm(dim=-1).min() > 0


def test_moe_does_not_rescale_the_weights_that_are_kept():
    """A token that loses one of its two experts keeps the other's weight as it was."""
    layer = steered_layer(top_k=2, normalize_topk=True, capacity_factor=1.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[4.0, 4, 4, 4], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]]))
    x = tokens_for([1, 2, 3])  # each to expert 0 and to its own; expert 0 has two slots
    y, stats = run(layer, x)
    routing = layer.router(x[0])
    gate, up = (layer.experts.gate_up[3] @ x[0, 2]).chunk(2)
    own_answer = layer.experts.down[3] @ (torch.nn.functional.silu(gate) * up)
    assert stats.dropped_assignments == 1
    assert routing.expert_indices[2].tolist() == [0, 3]
    assert_close(y[0, 2], routing.expert_weights[2, 1] * own_answer, atol=1e-6, rtol=1e-5)  # float32 rounding


def test_moe_counts_assignments_before_dropping():
    """tokens_per_expert is what the router chose, N · K in all, whatever was dropped."""
    layer = steered_layer(capacity_factor=0.5)
    _, stats = run(layer, tokens_for([0, 0, 0, 1, 0, 2, 3, 3]))
    assert stats.tokens_per_expert.tolist() == [4, 1, 1, 2]
    assert stats.dropped_assignments == 4


def test_moe_dropping_never_lets_a_later_token_evict_an_earlier_one():
    """In training with dropping, what the first tokens get does not depend on what the later ones are."""
    layer = random_layer(capacity_factor=0.6)
    x = torch.randn(1, 24, 32)
    changed = x.clone()
    changed[:, 10:] = torch.randn(1, 14, 32)
    y, stats = run(layer, x)
    y_changed, _ = layer(changed)
    assert stats.dropped_assignments > 0
    assert_close(y_changed[:, :10], y[:, :10], atol=1e-5, rtol=0)  # float32 products of other shapes
    assert not torch.allclose(y_changed[:, 10:], y[:, 10:], atol=1e-3)


@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_moe_padding_changes_no_statistic_no_output_and_no_slot(side, capacity_factor):
    """Padding is not counted in losses, statistics or capacity: the valid tokens cannot tell it is there."""
    layer = random_layer(capacity_factor=capacity_factor)
    x, padding = torch.randn(1, 12, 32), torch.randn(1, 9, 32)
    y, stats = run(layer, x)
    padded = torch.cat([padding, x] if side == "left" else [x, padding], dim=1)
    valid_mask = torch.zeros(1, 21, dtype=torch.bool)
    valid_mask[:, slice(9, None) if side == "left" else slice(12)] = True
    y_padded, stats_padded = run(layer, padded, valid_mask)
    assert_close(y_padded[valid_mask], y[0], atol=1e-5, rtol=0)  # float32 products of other shapes
    for actual, expected in zip(stats_padded, stats, strict=True):
        assert_close(actual, expected, atol=1e-6, rtol=1e-5)  # float32 means; counts are whole numbers
    assert (stats.dropped_assignments > 0) == (capacity_factor is not None)


def test_moe_statistics_carry_gradients_only_where_they_are_losses():
    """The two losses are differentiable, the two sums are whole numbers without a graph."""
    _, stats = run(random_layer(capacity_factor=0.5), torch.randn(2, 8, 32))
    assert stats.load_balancing_loss.requires_grad
    assert stats.router_z_loss.requires_grad
    assert stats.tokens_per_expert.dtype == stats.dropped_assignments.dtype == torch.int64


def test_moe_changes_no_state_in_forward():
    """Losses and statistics are return values: a training pass leaves every parameter and buffer as it was."""
    layer = random_layer(balance="bias", capacity_factor=0.5)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    attributes = set(vars(layer))
    layer(torch.randn(2, 8, 32))[0].sum().backward()
    assert set(vars(layer)) == attributes
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_moe_is_equivariant_to_the_order_of_tokens():
    """Permuting the tokens permutes the answers and changes no statistic."""
    layer = random_layer()
    x = torch.randn(1, 30, 32)
    order = torch.randperm(30)
    y, stats = run(layer, x)
    y_permuted, stats_permuted = run(layer, x[:, order])
    assert_close(y_permuted, y[:, order], atol=1e-5, rtol=0)  # float32 sums in another order
    assert torch.equal(stats_permuted.tokens_per_expert, stats.tokens_per_expert)


def random_choices(n_tokens: int, top_k: int, n_experts: int, seed: int = 0) -> torch.Tensor:
    """Return (N, K) distinct experts per token, unevenly loaded."""
    scores = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    return (scores * torch.arange(1, n_experts + 1)).topk(top_k).indices


def test_within_capacity_is_token_first_by_hand():
    """Two slots per expert go to the earliest tokens, a first choice having no precedence over an earlier second."""
    choices = torch.tensor([[0, 1], [1, 0], [0, 1], [2, 0]])
    kept = within_capacity(choices, 3, expert_capacity=2)
    assert kept.tolist() == [[True, True], [True, True], [False, False], [True, False]]


@pytest.mark.parametrize("expert_capacity", [1, 3, 6])
def test_within_capacity_never_lets_a_later_token_evict_an_earlier_one(expert_capacity):
    """Whatever comes later, the first tokens keep or lose their slots as if they were alone."""
    first, last = random_choices(20, 2, 4, seed=0), random_choices(20, 2, 4, seed=1)
    alone = within_capacity(first, 4, expert_capacity)
    followed = within_capacity(torch.cat([first, last]), 4, expert_capacity)
    assert torch.equal(followed[:20], alone)
    assert not alone.all()


def test_within_capacity_fills_every_slot_before_it_drops():
    """An expert keeps exactly the smaller of its assignments and its capacity."""
    choices = random_choices(40, 2, 4)
    kept = within_capacity(choices, 4, expert_capacity=15)
    for expert in range(4):
        chosen = choices == expert
        assert (kept & chosen).sum() == min(int(chosen.sum()), 15)
