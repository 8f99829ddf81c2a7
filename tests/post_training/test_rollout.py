"""Sampling and scoring agree; each answer has random numbers of its own; the end of an answer is part of it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VARIANTS, random_tokens, tiny_model
from torch import nn

from moe_gpt.errors import InputError
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.policy import policy_loss, token_log_probs, token_weights
from moe_gpt.post_training.rollout import Rollout, replaying, require_exact, sample, score

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
ENDS = (0, 1, 2, 3)


def rollout_of(model: MoEGPT, prompts: list[list[int]] = PROMPTS, n_samples: int = 4, **changes) -> Rollout:
    """Sample answers of at most ten tokens to prompts of different lengths."""
    settings = {"max_new_tokens": 10, "ends": ENDS, "seed": 0, "step": 0}
    return sample(model, prompts, n_samples, **(settings | changes))


def largest_difference(model: MoEGPT, rollout: Rollout, temperature: float = 1.0) -> float:
    """Return how far scored log-probabilities are from sampled ones at most."""
    return (score(model, rollout, temperature).log_probs - rollout.log_probs).abs().max().item()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_sampled_log_probs_are_scored_log_probs(changes):
    """In float32 within 1e-5, at a temperature, in training mode: the first importance ratio is 1."""
    model = tiny_model(**changes).train()
    rollout = rollout_of(model, temperature=0.5)
    assert rollout.log_probs.min() < -1
    assert largest_difference(model, rollout, 0.5) < 1e-5


def test_a_temperature_that_is_forgotten_would_be_seen():
    """Scoring at another temperature than that of the sampler gives other numbers."""
    model = tiny_model()
    assert largest_difference(model, rollout_of(model, temperature=0.5)) > 0.1


@pytest.mark.parametrize("changes", [{"router_noise": 0.5}, {"capacity_factor": 0.5}], ids=str)
def test_settings_that_cannot_agree_are_refused(changes):
    """They are refused by name, and scores would really differ under them."""
    ((key, value),) = changes.items()
    model = tiny_model(**changes)
    with pytest.raises(InputError, match=f"model.{key} must be .* got {value}: .*fine-tune with model.{key}="):
        require_exact(model.config)
    with pytest.raises(InputError, match=key):
        rollout_of(model)
    exact = tiny_model()
    assert largest_difference(model.train(), rollout_of(exact)) > 1e-3


def test_an_answer_in_a_left_padded_batch_scores_as_alone():
    """Positions count from the first valid token."""
    model = tiny_model()
    rollout = rollout_of(model)
    scored = score(model, rollout).log_probs
    for row in range(len(rollout.tokens)):
        alone = rollout.tokens[row][rollout.valid[row]][None]
        n_new = int(rollout.is_answer[row].sum())
        expected = token_log_probs(model(alone[:, :-1]).logits, alone[:, 1:])[0, -n_new:]
        torch.testing.assert_close(scored[row][rollout.is_answer[row]], expected, atol=1e-5, rtol=0)


def test_answers_do_not_depend_on_the_batch():
    """A row gets the same answer in a batch, in a part of it, and alone."""
    model = tiny_model()
    whole = rollout_of(model)
    for first in (0, 1, 2):
        part = rollout_of(model, PROMPTS[first : first + 1], first_row=4 * first)
        for row in range(4):
            mine, theirs = (r.answers[i][r.is_answer[i]] for r, i in ((part, row), (whole, 4 * first + row)))
            assert mine.equal(theirs)


def test_answers_follow_from_seed_step_and_row():
    """Again the same, whatever torch's generator did; with another seed or step, others."""
    model = tiny_model()
    first = rollout_of(model)
    before = torch.random.get_rng_state()
    again = rollout_of(model)
    assert all(map(torch.equal, first, again))
    assert torch.random.get_rng_state().equal(before)
    others = [rollout_of(model, **change) for change in ({"seed": 1}, {"step": 1})]
    assert all(not other.answers[:, 0].equal(first.answers[:, 0]) for other in others)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_sample_draws_its_own_first_token(temperature):
    """4,000 samples of a prompt have the model's frequencies, and neighbours agree as often as independent ones.

    The chance that one of these numbers is off by 5 deviations is below 1 in 10,000, and the seed is fixed.
    """
    model, n = tiny_model(), 4000
    first = rollout_of(model, [[5, 6]], n, max_new_tokens=1, temperature=temperature).answers[:, 0]
    probs = (model(torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1)
    for found, p in ((first.bincount(minlength=len(probs)), probs), ((first[1:] == first[:-1]).sum(), probs @ probs)):
        assert ((found - n * p).abs() < 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_an_answer_holds_its_end_and_nothing_more():
    """The last sampled token ends the answer, unless the answer is as long as allowed; padding follows."""
    rollout = rollout_of(tiny_model(), n_samples=20)
    lengths = rollout.is_answer.sum(1)
    assert 1 <= lengths.min() < lengths.max() == 10
    for tokens, mask in zip(rollout.answers, rollout.is_answer, strict=True):
        answer = tokens[mask].tolist()
        assert mask.tolist() == [True] * len(answer) + [False] * (10 - len(answer))
        assert not set(answer[:-1]) & set(ENDS)
        assert len(answer) == 10 or answer[-1] in ENDS
    assert rollout.valid[:, -10:].equal(rollout.is_answer)
    assert rollout.log_probs[~rollout.is_answer].count_nonzero() == 0


class EndShift(nn.Module):
    """Adds one number to the logits of the tokens that end an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, logits):
        """Shift them."""
        is_end = torch.isin(torch.arange(logits.shape[-1]), torch.tensor(ENDS))
        return logits + self.shift * is_end


@pytest.mark.parametrize("has_end", [True, False])
def test_a_reward_for_ending_makes_endings_likelier(has_end):
    """Learning raises the logits of ends. Where the mask lacks the end, as a bug had it, learning lowers them."""
    model, shift = tiny_model(), EndShift()
    model.output = nn.Sequential(model.output, shift)
    rollout = rollout_of(model, [[5, 6]], 200)
    is_end = torch.isin(rollout.answers, torch.tensor(ENDS)) & rollout.is_answer
    mask = rollout.is_answer if has_end else rollout.is_answer & ~is_end
    advantages = is_end.any(1, keepdim=True).float()
    log_probs = score(model, rollout).log_probs
    policy_loss(log_probs, rollout.log_probs, advantages, mask, token_weights(mask)).backward()
    assert (shift.shift.grad < 0) == has_end


def test_a_rollout_can_be_learned_from():
    """Its tensors may be saved for a backward pass; the model keeps its mode and its gradients stay empty."""
    model = tiny_model().train()
    rollout = rollout_of(model)
    assert model.training
    assert not any(part.is_inference() for part in rollout)
    assert all(p.grad is None for p in model.parameters())
    scored = score(model, rollout)
    (scored.log_probs * rollout.log_probs).sum().backward()
    assert model.embedding.weight.grad.isfinite().all()


def test_statistics_leave_padding_out():
    """Each real token of a rollout is counted at top_k experts of each layer."""
    model = tiny_model()
    rollout = rollout_of(model)
    stats = score(model, rollout).router_stats
    assert not rollout.valid.all()
    assert stats.tokens_per_expert.sum(1).tolist() == [2 * rollout.valid.sum()] * 2
    assert score(tiny_model(n_experts=1, top_k=1), rollout).router_stats is None


def test_entropy_is_that_of_the_sampled_distribution():
    """At a temperature so high that all tokens are equally likely, it is ln V."""
    model = tiny_model()
    rollout = rollout_of(model, temperature=1e6)
    found = score(model, rollout, 1e6).entropy
    torch.testing.assert_close(found, rollout.is_answer * math.log(model.config.vocab_size))
    assert not found.requires_grad


def test_replayed_routes_stay_when_weights_move():
    """Weights and gradients come from the moved router; afterwards it chooses by itself again."""
    model, moved = tiny_model(), tiny_model(seed=1)
    rollout = rollout_of(model)
    recorded, own = score(model, rollout).routings, score(moved, rollout).routings
    with replaying(moved, recorded):
        scored = score(moved, rollout)
    chosen = [routing.expert_indices for routing in recorded]
    assert not any(map(torch.equal, chosen, (routing.expert_indices for routing in own)))
    assert all(map(torch.equal, chosen, (routing.expert_indices for routing in scored.routings)))
    for routing in scored.routings:
        expected = routing.router_logits.gather(-1, routing.expert_indices).softmax(-1)
        torch.testing.assert_close(routing.expert_weights, expected)
    scored.log_probs.sum().backward()
    assert moved.blocks[0].feed_forward.router.weight.grad.abs().max() > 0
    again = score(moved, rollout).routings
    assert all(a.expert_indices.equal(b.expert_indices) for a, b in zip(own, again, strict=True))


def test_replaying_the_own_routes_changes_nothing():
    """Log-probabilities are the same bits, also with a balancing bias."""
    for balance in ("loss", "bias"):
        model = tiny_model(balance=balance)
        rollout = rollout_of(model)
        plain = score(model, rollout)
        with replaying(model, plain.routings):
            assert score(model, rollout).log_probs.equal(plain.log_probs)


class OwnForward(Router):
    """A router that chooses in its own way."""

    def forward(self, x):
        """Choose as usual."""
        return super().forward(x)


def test_routers_that_could_ignore_a_replay_are_refused():
    """No router keeps a recording then."""
    model = MoEGPT(tiny_model().config, OwnForward)
    with pytest.raises(InputError, match="OwnForward"), replaying(model, model.routings(random_tokens(1, 4))):
        pass
    assert all("scores" not in vars(layer.router) for layer in model.moe_layers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": [[1] * 23]}, "got 10 behind a prompt of 23 tokens"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
    ],
)
def test_bad_requests_are_refused(changes, message):
    """The message has the value."""
    with pytest.raises(InputError, match=message):
        rollout_of(tiny_model(), **changes)


def test_damaged_weights_are_refused():
    """Before a token is drawn from them."""
    model = tiny_model()
    with torch.no_grad():
        model.output.weight[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        rollout_of(model)
