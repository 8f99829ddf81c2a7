"""Advantages, ratios, losses and KL: by hand, against enumeration, and with padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from two_tokens import MASK, log_probs_of, mean_gradient, random_table

from moe_gpt.errors import InputError
from moe_gpt.post_training.policy import (
    clipped_loss,
    entropy,
    gae,
    group_advantages,
    importance_ratios,
    kl_estimate,
    leave_one_out_advantages,
    policy_loss,
    token_log_probs,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)

EQUAL = [[0.35] * 8, [0.1] * 8, [1.0] * 8, [0.0] * 8]
MIXED = [[0.35] * 7 + [1.0]]
REWARDS = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("advantages_of", [group_advantages, leave_one_out_advantages])
def test_equal_rewards_give_exactly_no_advantage(advantages_of):
    """Also where the mean of equal floats is not that float."""
    assert torch.tensor(EQUAL).mean(1)[0] != 0.35  # so that subtracting the mean would leave something
    assert advantages_of(EQUAL).count_nonzero() == 0
    assert group_advantages(EQUAL, scale=True).count_nonzero() == 0


def test_advantages_of_one_better_answer():
    """Seven answers at 0.35 and one at 1: the values that the definitions give."""
    assert group_advantages(MIXED).max().item() == pytest.approx(0.65 * 7 / 8)
    assert leave_one_out_advantages(MIXED).max().item() == pytest.approx(0.65)
    assert group_advantages(MIXED, scale=True).max().item() == pytest.approx(2.4749, abs=2e-3)


def test_integers_and_booleans_are_numbers():
    """They give what the same floats give."""
    expected = group_advantages([[0.0, 1.0] * 4])
    assert group_advantages([[0, 1] * 4]).equal(expected)
    assert group_advantages([[False, True] * 4]).equal(expected)
    assert group_advantages(torch.tensor([[False, True] * 4])).equal(expected)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, None, 1e39])
@pytest.mark.parametrize("advantages_of", [group_advantages, leave_one_out_advantages])
def test_rewards_that_are_no_numbers_are_refused(advantages_of, wrong):
    """The message names the reward and the prompt's row."""
    with pytest.raises(InputError, match="parses of prompt row 2, answer 3 must be a finite number"):
        advantages_of([[0.0] * 4, [0.1, 0.2, wrong, 0.4]], name="parses")


@pytest.mark.parametrize("rewards", [[[0.7]], [], [[1.0, 2.0], [1.0]]])
def test_groups_without_comparison_are_refused(rewards):
    """A single answer, none, and groups of different sizes."""
    with pytest.raises(InputError, match="at least 2"):
        group_advantages(rewards)


def test_log_probs_and_entropy_by_hand():
    """Two tokens with logits 0 and ln 3 have the probabilities 1/4 and 3/4; at temperature 1/2, 1/10 and 9/10."""
    logits = torch.tensor([[[0.0, math.log(3)]]])
    targets = torch.tensor([[0]])
    assert token_log_probs(logits, targets).item() == pytest.approx(math.log(1 / 4))
    assert token_log_probs(logits, targets, temperature=0.5).item() == pytest.approx(math.log(1 / 10))
    assert entropy(logits).item() == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert entropy(logits, temperature=0.5).item() == pytest.approx(math.log(10) - 0.9 * math.log(9))


def test_gae_by_hand():
    """Three tokens, gamma 1/2 and lambda 1/2: the deltas are 1.5, 0.5 and 1, each later one counts a quarter."""
    rewards, values = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[0.5, 2.0, 3.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    deltas = [1 + 0.5 * 2 - 0.5, 0 + 0.5 * 3 - 2, 4 - 3]
    expected = [deltas[0] + 0.25 * (deltas[1] + 0.25 * deltas[2]), deltas[1] + 0.25 * deltas[2], deltas[2]]
    assert advantages[0].tolist() == pytest.approx(expected)
    assert returns[0].tolist() == pytest.approx([a + v for a, v in zip(expected, [0.5, 2.0, 3.0], strict=True)])


def test_gae_without_values_or_discount_is_the_reward_to_go():
    """With gamma = lambda = 1 and V = 0, as in REINFORCE."""
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    advantages, _ = gae(rewards, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert advantages.tolist() == [[7.0, 6.0, 4.0]]


def padded(x: Tensor, value: float) -> Tensor:
    """Put two columns before, one in the middle and three behind the tokens, all with ``value``."""
    wide = x.new_full((len(x), x.shape[1] + 6), value)
    wide[:, 2:4], wide[:, 5:-3] = x[:, :2], x[:, 2:]
    return wide


@pytest.mark.parametrize("filler", [1e9, math.inf, math.nan])
def test_padding_changes_nothing(filler):
    """Whatever its numbers: in advantages, returns, whitening and gradients bit for bit, in losses to rounding."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    numbers = [torch.randn(3, 4) for _ in range(5)]

    def results(mask: Tensor, numbers: list[Tensor]) -> list[Tensor]:
        a, b, c, d, e = (x.clone().requires_grad_() for x in numbers)
        weights = token_weights(mask, "dr_grpo", 4)
        advantages, returns = (x.detach() for x in gae(a, b, mask, 0.9, 0.8))
        loss = policy_loss(c, d, advantages, mask, weights, reference_log_probs=e, kl_weight=0.1, kl="k3")
        loss = loss + value_loss(b, a, returns, mask, weights)
        gradients = torch.autograd.grad(loss, (b, c))
        tokens = [advantages, returns, whiten(a.detach(), mask), *gradients]
        return [loss.detach(), *(x[mask] for x in tokens)]

    plain = results(mask, numbers)
    wide = results(padded(mask, False), [padded(x, filler) for x in numbers])
    torch.testing.assert_close(wide[0], plain[0])
    assert all(map(torch.equal, plain[1:], wide[1:]))


def test_whitening_over_padding_would_be_seen():
    """The mean and deviation over all places differ from those over the mask, which is what the test above needs."""
    x, mask = torch.tensor([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    assert whiten(x, mask)[0].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])
    everywhere = (x - x.mean()) / x.std(correction=0)
    assert (everywhere[0, :2] - whiten(x, mask)[0, :2]).abs().max() > 0.3


def test_clipped_loss_by_hand():
    """Ratios 1.5 and 0.5 with advantages of both signs: only a change that already went too far is cut."""
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]], requires_grad=True)
    loss = clipped_loss(ratios, torch.tensor([[2.0, -2.0, 2.0, -2.0]]), clip=0.2)
    assert loss[0].tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6])
    loss.sum().backward()
    assert ratios.grad[0].tolist() == pytest.approx([0.0, 2.0, -2.0, 0.0])


def test_value_loss_by_hand():
    """A value that moved from 0 to 1 with clip 0.2 counts as 0.2 where this is further from the return."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = torch.tensor([[0.25, 0.75]])
    loss = value_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), mask, weights, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.25 * 0.8**2 + 0.75 * 1.0**2))


def test_ratios_by_hand():
    """Of tokens, their geometric mean, and their product; padding does not count."""
    new, old = torch.tensor([[2.0, 8.0, 5.0]]).log(), torch.ones(1, 3).log()
    mask = torch.tensor([[True, True, False]])
    assert importance_ratios(new, old, mask)[0].tolist() == pytest.approx([2.0, 8.0, 1.0])
    assert importance_ratios(new, old, mask, "sequence").item() == pytest.approx(4.0)
    assert importance_ratios(new, old, mask, "trajectory").item() == pytest.approx(16.0)


def test_weights_by_hand():
    """Answers of one and three tokens, of at most four."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    assert token_weights(mask, "grpo")[:, 0].tolist() == pytest.approx([1 / 2, 1 / 6])
    assert token_weights(mask, "dr_grpo", 4)[:, 0].tolist() == pytest.approx([1 / 8, 1 / 8])
    assert token_weights(mask, "bnpo")[:, 0].tolist() == pytest.approx([1 / 4, 1 / 4])
    assert all(token_weights(mask, kind)[0, 1:].tolist() == [0, 0] for kind in ("grpo", "dr_grpo", "dapo"))


@pytest.mark.parametrize(("reduction", "is_equal"), [("dr_grpo", True), ("dapo", True), ("grpo", False)])
def test_a_token_counts_the_same_in_short_and_long_answers(reduction, is_equal):
    """By default and with dapo; the first GRPO divides by the answer's length, and the test sees it."""
    log_probs = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    weights = token_weights(mask, reduction)
    policy_loss(log_probs, log_probs.detach(), torch.ones(2, 1), mask, weights).backward()
    assert (log_probs.grad[0, 0] == log_probs.grad[1, 0]) == is_equal
    assert token_weights(mask).equal(token_weights(mask, "dr_grpo", 3))


def test_micro_batches_add_up():
    """Rows of the whole batch's weights give losses whose sum is the whole batch's loss."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    new, old, advantages = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1)
    weights = token_weights(mask, "dapo")
    rows = zip(*(x.split(1) for x in (new, old, advantages, mask, weights)), strict=True)
    parts = sum(policy_loss(*row) for row in rows)
    torch.testing.assert_close(parts, policy_loss(new, old, advantages, mask, weights))


def test_token_rewards_by_hand():
    """The KL costs at every token that was sampled, and the score comes at the last one."""
    mask = torch.tensor([[True, False, True, False], [True, False, False, False]])
    kl = torch.tensor([[1.0, 9.0, 2.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_weight=0.5)
    assert rewards.tolist() == [[-0.5, 0.0, 9.0, 0.0], [18.5, 0.0, 0.0, 0.0]]


def loss_of_rewards(advantages: Tensor, new: Tensor, importance: str = "token") -> Tensor:
    """Return the loss of one answer, its tokens added up."""
    return policy_loss(new, new.detach(), advantages, MASK, token_weights(MASK, "dr_grpo", 1), importance=importance)


@pytest.mark.parametrize("importance", ["token", "trajectory"])
def test_policy_gradient_of_the_expected_reward_is_exact(importance):
    """Over all answers of two tokens, it is the gradient of the expected reward, with the opposite sign."""
    table = random_table(0)

    def loss(i: int, new: Tensor) -> Tensor:
        summed = loss_of_rewards(REWARDS[i].view(1, 1), new, importance)
        return summed / 2 if importance == "trajectory" else summed  # one ratio for both tokens is counted twice

    (expected,) = torch.autograd.grad((log_probs_of(table).sum(1).exp() * REWARDS).sum(), table)
    torch.testing.assert_close(mean_gradient(table, loss), -expected)


def test_ppo_gradient_is_exact():
    """With the reward-to-go of GAE, and whatever the values, because lambda = gamma = 1 makes them a baseline."""
    table, values = random_table(0), torch.tensor([[0.7, -0.2]], dtype=torch.float64)

    def loss(i: int, new: Tensor) -> Tensor:
        rewards = token_rewards(REWARDS[i : i + 1], torch.zeros_like(new), MASK, 0.0)
        return loss_of_rewards(gae(rewards, values, MASK, 1.0, 1.0)[0], new)

    (expected,) = torch.autograd.grad((log_probs_of(table).sum(1).exp() * REWARDS).sum(), table)
    torch.testing.assert_close(mean_gradient(table, loss), -expected)


def kl_of(table: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy || reference) of whole answers."""
    ours, theirs = log_probs_of(table).sum(1), log_probs_of(reference).sum(1)
    return (ours.exp() * (ours - theirs)).sum()


def test_kl_in_the_reward_has_the_exact_gradient():
    """k1 without gradient, as a cost of each token, with the reward-to-go."""
    table, reference = random_table(0), random_table(1).detach()

    def loss(i: int, new: Tensor) -> Tensor:
        kl = kl_estimate(new.detach(), log_probs_of(reference)[i : i + 1], MASK, "k1")
        rewards = token_rewards(torch.zeros(1, dtype=torch.float64), kl, MASK, kl_weight=1.0)
        return loss_of_rewards(gae(rewards, torch.zeros_like(rewards), MASK, 1.0, 1.0)[0], new)

    (expected,) = torch.autograd.grad(kl_of(table, reference), table)
    torch.testing.assert_close(mean_gradient(table, loss), expected)


def kl_at_sampled_beginnings(table: Tensor, reference: Tensor) -> Tensor:
    """Return the KL of each token's distribution, the beginnings weighted by how often they are sampled."""
    logs, theirs = table.log_softmax(-1), reference.log_softmax(-1)
    weights = torch.cat([torch.ones(1, dtype=torch.float64), logs[0].detach().exp()])
    return (weights[:, None] * logs.exp() * (logs - theirs)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_as_loss_has_the_gradient_of_each_tokens_kl(kind):
    """Both estimators, because the loss multiplies them by the ratio."""
    table, reference = random_table(0), random_table(1).detach()

    def loss(i: int, new: Tensor) -> Tensor:
        theirs = log_probs_of(reference)[i : i + 1]
        zero, weights = torch.zeros(1, 1, dtype=torch.float64), token_weights(MASK, "dr_grpo", 1)
        return policy_loss(new, new.detach(), zero, MASK, weights, reference_log_probs=theirs, kl_weight=1.0, kl=kind)

    (expected,) = torch.autograd.grad(kl_at_sampled_beginnings(table, reference), table)
    torch.testing.assert_close(mean_gradient(table, loss), expected)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_an_estimator_without_the_ratio_has_another_gradient(kind):
    """The faulty form: the mean gradient of k1 is 0, that of k3 belongs to the KL in the other direction."""
    table, reference = random_table(0), random_table(1).detach()
    theirs = log_probs_of(reference)
    faulty = mean_gradient(table, lambda i, new: kl_estimate(new, theirs[i : i + 1], MASK, kind).sum())
    (right,) = torch.autograd.grad(kl_at_sampled_beginnings(table, reference), table)
    assert (faulty - right).abs().max() > 0.05
    if kind == "k1":
        torch.testing.assert_close(faulty, torch.zeros_like(faulty), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_have_the_right_mean(kind):
    """Over all answers; k3 is never negative."""
    table, reference = random_table(0).detach(), random_table(1).detach()
    ours, theirs = log_probs_of(table), log_probs_of(reference)
    estimate = kl_estimate(ours, theirs, torch.ones(4, 2, dtype=torch.bool), kind)
    mean = (ours.sum(1).exp()[:, None] * estimate).sum()
    torch.testing.assert_close(mean, kl_of(table, reference))
    assert kind == "k1" or estimate.min() >= 0
