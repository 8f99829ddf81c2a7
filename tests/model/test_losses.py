"""Cross entropy, load balancing and z loss: by hand, at the limits, and where their gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VARIANTS, gradients_of, random_tokens, routers_of, tiny_config, tiny_model, training_loss
from torch.testing import assert_close

from moe_gpt.config import LossConfig
from moe_gpt.model.losses import (
    IGNORED_TARGET,
    combine_losses,
    count_assignments,
    cross_entropy,
    cross_entropy_from_hidden,
    load_balancing_loss,
    router_z_loss,
)
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import MoEGPT

MOE_VARIANTS = [name for name, changes in VARIANTS.items() if changes.get("n_experts") != 1]


@pytest.mark.parametrize(("n_experts", "top_k"), [(2, 1), (2, 2), (3, 2), (8, 1), (8, 2), (16, 4)])
def test_load_balancing_loss_is_one_under_uniform_routing(n_experts, top_k):
    """Uniform routing gives exactly 1 for every K."""
    n_tokens = 3 * n_experts
    counts = torch.full((n_experts,), n_tokens * top_k // n_experts)
    loss = load_balancing_loss(torch.full((n_tokens, n_experts), 1 / n_experts), counts)
    assert_close(loss, torch.tensor(1.0), atol=1e-6, rtol=0)  # 1/3 is not a float32


@pytest.mark.parametrize("n_experts", [2, 4, 16])
def test_load_balancing_loss_is_n_experts_when_one_expert_gets_everything(n_experts):
    """E when one expert gets every token with probability 1 (K = 1)."""
    probs = torch.eye(n_experts)[torch.full((10,), n_experts - 1)]
    counts = torch.zeros(n_experts, dtype=torch.int64)
    counts[-1] = 10
    assert load_balancing_loss(probs, counts) == n_experts


def test_load_balancing_loss_increases_with_the_load_of_one_expert():
    """Strictly increasing from 1 to E as one expert takes from 1/E to all of the tokens."""
    losses = []
    for n_first in range(10, 41, 3):
        choices = [0] * n_first + [1, 2, 3] * ((40 - n_first) // 3)
        probs = torch.eye(4)[torch.tensor(choices)]
        losses.append(load_balancing_loss(probs, probs.sum(dim=0).long()))
    losses = torch.stack(losses)
    assert (losses.diff() > 0).all()
    assert_close(losses[[0, -1]], torch.tensor([1.0, 4.0]), atol=1e-6, rtol=0)  # float32 rounding


def test_load_balancing_loss_by_hand():
    """Shares (1/2, 1/4, 1/4) and mean probabilities (.55, .2, .25) of three experts give 3 · .3875."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])  # choices (0, 1) and (0, 2)
    loss = load_balancing_loss(probs, torch.tensor([2, 1, 1]))
    assert_close(loss, torch.tensor(1.1625), atol=1e-6, rtol=0)  # float32 rounding


def test_load_balancing_loss_has_its_gradient_through_the_probabilities_only():
    """The derivative by a token's probability of expert e is E · f_e / N."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]], requires_grad=True)
    load_balancing_loss(probs, torch.tensor([2, 1, 1])).backward()
    assert_close(probs.grad, torch.tensor([[0.75, 0.375, 0.375]] * 2), atol=1e-6, rtol=0)  # float32 rounding


class PreferringRouter(Router):
    """A router whose logits are 20 for one expert and 0 for the others, whatever the token."""

    favourite = 0

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Prefer the favourite; keep the weight in the graph."""
        preference = torch.zeros(len(self.weight))
        preference[self.favourite] = 20.0
        return preference + 0 * (x @ self.weight.T)


def test_load_balancing_loss_of_opposite_layers_does_not_cancel():
    """Two layers that each overload another of two experts are both unbalanced: the mean over layers is 2, not 1."""
    config = tiny_config(n_experts=2, top_k=1, normalize_topk=False)
    model = MoEGPT(config, make_router=PreferringRouter)
    routers_of(model)[1].favourite = 1
    output = model(random_tokens(2, 8))
    counts = output.router_stats.tokens_per_expert
    assert counts.sum(dim=0).tolist() == [16, 16]  # balanced if the layers are added up
    terms = training_loss(output, random_tokens(2, 8), model)
    assert_close(terms.load_balancing_loss, torch.tensor(2.0), atol=1e-5, rtol=0)  # e^-20 is 2e-9


def test_router_z_loss_equals_its_definition():
    """Mean over tokens of (ln Σ exp logits)², ST-MoE eq. 5."""
    logits = 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    expected = (logits.double().exp().sum(dim=-1).log() ** 2).mean()
    assert_close(router_z_loss(logits).double(), expected, atol=0, rtol=1e-6)  # float32 rounding


def test_router_z_loss_of_zero_logits_is_the_squared_logarithm_of_n_experts():
    """Four equal experts with logits of 0 give (ln 4)², whatever top_k is."""
    assert_close(router_z_loss(torch.zeros(7, 4)), torch.tensor(math.log(4) ** 2), atol=0, rtol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16_autocast"])
def test_router_losses_of_valid_tokens_are_those_without_the_others(autocast):
    """With valid_mask both losses are those of the valid tokens alone, in float32 whatever autocast says."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator)
    probs, counts = logits.softmax(dim=-1), torch.tensor([10, 20, 30, 40])
    valid = torch.rand(200, generator=generator) < 0.7
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        balancing, z = load_balancing_loss(probs, counts, valid), router_z_loss(logits, valid)
    assert balancing.dtype == z.dtype == torch.float32
    # float32 sums in another order; bf16 would be wrong by 1e-3
    assert_close(balancing, load_balancing_loss(probs[valid], counts), atol=1e-6, rtol=1e-5)
    assert_close(z, router_z_loss(logits[valid]), atol=1e-6, rtol=1e-5)


def test_router_losses_without_a_valid_token_are_zero():
    """Nothing but padding gives 0, not a division by 0."""
    nothing = torch.zeros(5, dtype=torch.bool)
    assert load_balancing_loss(torch.full((5, 4), 0.25), torch.zeros(4, dtype=torch.int64), nothing) == 0
    assert router_z_loss(torch.ones(5, 4), nothing) == 0


def test_count_assignments_counts_valid_tokens_only():
    """Three tokens choose (0, 2), (2, 1), (2, 0): counts 2, 1, 3; without the last token 1, 1, 2."""
    choices = torch.tensor([[[0, 2], [2, 1], [2, 0]]])
    assert count_assignments(choices, 4).tolist() == [[2, 1, 3, 0]]
    assert count_assignments(choices, 4, torch.tensor([True, True, False])).tolist() == [[1, 1, 2, 0]]


def test_cross_entropy_by_hand():
    """Equal logits over four words cost ln 4 each; odds of 1 : 3 cost ln 4 for the first and ln 4/3 for the second."""
    logits = torch.tensor([[[0.0, 0, 0, 0], [0, math.log(3), -torch.inf, -torch.inf]]]).repeat(2, 1, 1)
    total, n_valid = cross_entropy(logits, torch.tensor([[2, 0], [3, 1]]))
    assert_close(total, torch.tensor(3 * math.log(4) + math.log(4 / 3)), atol=1e-5, rtol=0)  # float32 rounding
    assert n_valid == 4


def test_cross_entropy_ignores_ignored_targets():
    """Targets of IGNORED_TARGET add nothing to the sum, the count or the gradient."""
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[1, IGNORED_TARGET, 2], [IGNORED_TARGET, 0, IGNORED_TARGET]])
    total, n_valid = cross_entropy(logits, targets)
    total.backward()
    kept = targets != IGNORED_TARGET
    expected = -logits.log_softmax(dim=-1)[kept].gather(1, targets[kept][:, None]).sum()
    assert n_valid == 3
    assert_close(total, expected, atol=1e-6, rtol=1e-6)  # float32 rounding
    assert logits.grad[~kept].abs().max() == 0


def test_cross_entropy_without_a_valid_target_is_zero():
    """A batch of nothing but ignored targets has the sum 0 of 0 targets."""
    total, n_valid = cross_entropy(torch.randn(1, 4, 7), torch.full((1, 4), IGNORED_TARGET))
    assert (total, n_valid) == (0, 0)


def test_cross_entropy_is_float32_for_bf16_logits():
    """Logits in bf16 are summed in float32."""
    logits = torch.randn(4, 50, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.ones(4, 50, dtype=torch.int64)
    total = cross_entropy(logits, targets).total
    assert total.dtype == torch.float32
    assert torch.equal(total, cross_entropy(logits.float(), targets).total)


def test_cross_entropy_from_hidden_counts_the_targets_that_count():
    """The sum is that of the logits, tests/ops has its ways; ignored targets are not counted."""
    hidden, weight = torch.randn(10, 6), torch.randn(7, 6)
    targets = torch.arange(10) % 7
    targets[[2, 7]] = IGNORED_TARGET
    ours, expected = (
        cross_entropy_from_hidden(hidden, weight, targets),
        cross_entropy((hidden @ weight.T)[None], targets[None]),
    )
    assert ours.n_valid == expected.n_valid == 8
    assert_close(ours.total, expected.total, atol=1e-5, rtol=1e-5)


def test_cross_entropy_from_hidden_under_autocast_sums_in_float32():
    """Products in bf16, the loss in float32, gradients in the weights' own type."""
    hidden = torch.randn(10, 6, requires_grad=True)
    weight = torch.randn(7, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = cross_entropy_from_hidden(hidden, weight, torch.arange(10) % 7).total
    total.backward()
    assert total.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert_close(total, F.cross_entropy(hidden @ weight.T, torch.arange(10) % 7, reduction="sum"), atol=0.2, rtol=0.02)


def test_cross_entropy_from_hidden_is_not_finite_where_the_logits_are_not():
    """A NaN in the weights reaches the loss, so that the step is skipped."""
    weight = torch.ones(7, 6)
    weight[3, 2] = torch.nan
    assert not cross_entropy_from_hidden(torch.ones(4, 6), weight, torch.zeros(4, dtype=torch.int64)).total.isfinite()


@pytest.mark.parametrize(("balance", "loss"), [("loss", 4.5), ("bias", 3.5), ("none", 3.5)])
def test_combine_losses_adds_weighted_means_over_layers(balance, loss):
    """2 + 0.5 · mean(1, 3) + 0.25 · mean(4, 8) is 4.5; without balance: loss the middle term has no weight."""
    terms = combine_losses(
        torch.tensor(2.0),
        torch.tensor([1.0, 3.0]),
        torch.tensor([4.0, 8.0]),
        tiny_config(balance=balance),
        LossConfig(load_balancing_loss_weight=0.5, router_z_loss_weight=0.25),
    )
    assert [term.item() for term in terms] == [loss, 2.0, 2.0, 6.0]  # whole numbers and powers of two


def test_combine_losses_of_a_dense_model_is_the_cross_entropy():
    """Without routers the loss is the cross entropy and the other terms are 0."""
    terms = combine_losses(torch.tensor(2.0), None, None, tiny_config(n_experts=1, top_k=1), LossConfig())
    assert [term.item() for term in terms] == [2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("term", ["ce_loss", "load_balancing_loss", "router_z_loss"])
@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_every_loss_term_alone_reaches_every_router(variant, term):
    """The gradient of each term by itself reaches the router of every layer."""
    model = tiny_model(**VARIANTS[variant])
    output = model(random_tokens(2, 16))
    getattr(training_loss(output, random_tokens(2, 16, seed=2), model), term).backward()
    for router in routers_of(model):
        assert router.weight.grad.norm() > 1e-3  # frozen routers have 1e-7


def test_router_gradient_of_cross_entropy_survives_normalize_topk():
    """Rescaling the chosen weights changes the router's gradient by less than a factor of 100 (it froze k = 1)."""
    norms = []
    for normalize_topk in (False, True):
        model = tiny_model(normalize_topk=normalize_topk)
        training_loss(model(random_tokens(2, 16)), random_tokens(2, 16, seed=2), model).ce_loss.backward()
        norms.append(torch.stack([router.weight.grad.norm() for router in routers_of(model)]))
    ratio = norms[1] / norms[0]
    assert (ratio > 0.01).all()
    assert (ratio < 100).all()


def test_balance_and_z_losses_reach_no_expert_of_the_last_layer():
    """The auxiliary terms move routers and what is below them; the last layer's experts are above all routers."""
    model = tiny_model()
    terms = training_loss(model(random_tokens(2, 16)), random_tokens(2, 16, seed=2), model)
    (terms.load_balancing_loss + terms.router_z_loss).backward()
    gradients = gradients_of(model)
    assert gradients["blocks.1.feed_forward.experts.down"] is None
    assert gradients["output.weight"] is None
    assert gradients["blocks.0.feed_forward.experts.down"].norm() > 0
