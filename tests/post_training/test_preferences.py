"""Losses on pairs, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moe_gpt.post_training.preferences import (
    bradley_terry_loss,
    dpo_loss,
    implicit_rewards,
    sequence_log_probs,
)


def test_bradley_terry_by_hand():
    """A margin of ln 3 gives the better answer 3/4; the scores' sum costs its square."""
    chosen, rejected = torch.tensor([math.log(3)]), torch.tensor([0.0])
    assert bradley_terry_loss(chosen, rejected, center=0.0).item() == pytest.approx(math.log(4 / 3))
    centred = bradley_terry_loss(chosen, rejected, center=0.5).item()
    assert centred == pytest.approx(math.log(4 / 3) + 0.5 * math.log(3) ** 2)


def test_bradley_terry_sees_differences_only():
    """Without the centre, a constant added to all scores changes neither loss nor gradient."""
    scores = torch.randn(2, 5, requires_grad=True, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = [bradley_terry_loss(scores[0] + shift, scores[1] + shift, center=0.0) for shift in (0.0, 7.0)]
    torch.testing.assert_close(losses[0], losses[1])
    gradient = torch.autograd.grad(losses[1], scores)[0]
    torch.testing.assert_close(gradient.sum(0), torch.zeros(5, dtype=torch.float64))


def test_dpo_by_hand():
    """Margins of 3 and 1 with beta 0.5 give sigmoid(1); the gradient raises the chosen and lowers the rejected."""
    chosen = torch.tensor([-2.0], requires_grad=True)
    rejected = torch.tensor([-5.0], requires_grad=True)
    loss = dpo_loss(chosen, rejected, torch.tensor([-4.0]), torch.tensor([-5.0]), beta=0.5)
    loss.backward()
    sigmoid = 1 / (1 + math.exp(-1))
    assert loss.item() == pytest.approx(-math.log(sigmoid))
    assert chosen.grad.item() == pytest.approx(-0.5 * (1 - sigmoid)) == -rejected.grad.item()
    assert implicit_rewards(chosen, torch.tensor([-4.0]), 0.5).item() == 1.0


def test_dpo_starts_at_ln_2():
    """Where policy and reference agree, whatever the answers."""
    chosen, rejected = torch.tensor([-3.0, -40.0]), torch.tensor([-30.0, -1.0])
    assert dpo_loss(chosen, rejected, chosen, rejected).item() == pytest.approx(math.log(2))


def test_sums_leave_out_what_the_mask_leaves_out():
    """Prompt and padding, whatever their numbers."""
    log_probs = torch.tensor([[math.nan, -1.0, -2.0], [-4.0, -math.inf, -8.0]])
    mask = torch.tensor([[False, True, True], [True, False, True]])
    assert sequence_log_probs(log_probs, mask).tolist() == [-3.0, -12.0]
