"""A step of reinforcement: what is learned, what stays, and that it is a closed form."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from moe_gpt.config import LossConfig, OptimizerConfig
from moe_gpt.config.post_training import PromptsConfig, RlConfig, RuleConfig
from moe_gpt.distributed.process import SOLO
from moe_gpt.errors import InputError
from moe_gpt.post_training.reinforcement import Prompt, Reinforcement, values_of
from moe_gpt.post_training.reward_model import ActorCritic, RewardModel
from moe_gpt.post_training.rollout import sample
from moe_gpt.post_training.update import ItemOrder
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import TrainState

PROMPTS = [Prompt([10 + i] * (1 + i % 3), f"prompt {i}") for i in range(6)]
PLAN = StepPlan(seq_len=12, batch_tokens=12 * 32, lr=2e-2)
LIKED = 30


def run_of(algorithm: str = "grpo", micro_batch_tokens: int = 10_000, **changes) -> SimpleNamespace:
    """Return a run's parts that a step reads."""
    model = tiny_model(**changes)
    if algorithm == "ppo":
        model = ActorCritic.of(model, RewardModel.from_model(model))
        torch.nn.init.zeros_(model.value.output.weight)  # as a reward model that knows nothing
    config = SimpleNamespace(
        model=model.config,
        optimizer=OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.1),
        loss=LossConfig(load_balancing_loss_weight=0.0, router_z_loss_weight=0.0),
        train=SimpleNamespace(micro_batch_tokens=micro_batch_tokens, seed=0),
    )
    state = TrainState(model, build_optimizer(model, config.optimizer))
    return SimpleNamespace(state=state, config=config, precision="fp32", team=SOLO, device=torch.device("cpu"))


def settings_of(**settings) -> RlConfig:
    """Return settings whose prompts and rewards nobody reads here."""
    return RlConfig(prompts=PromptsConfig(builtin="lines"), rewards=(RuleConfig(rule="parses"),), **settings)


def lesson_of(run: SimpleNamespace, algorithm: str = "grpo", reward=None, **settings) -> Reinforcement:
    """Return a reinforcement that likes the tokens below ``LIKED``, with the untrained model as the reference."""
    liked = lambda r, prompts, answers: [sum(ord(c) < LIKED for c in answer) / 4 for answer in answers]  # noqa: E731
    config = settings_of(algorithm=algorithm, max_new_tokens=4, **{"kl_weight": 0.02, **settings})
    reference = tiny_model() if config.kl_weight else None
    decode = lambda ids: "".join(map(chr, ids))  # noqa: E731
    return Reinforcement(config, PROMPTS, reward or liked, decode, frozenset({0, 1}), reference)


def weights_of(run: SimpleNamespace) -> list[torch.Tensor]:
    """Return copies of all tensors of the model."""
    return [tensor.clone() for tensor in run.state.model.state_dict().values()]


def check_that_rewards_rise(n_steps: int, algorithm: str, **settings) -> None:
    """Take steps; what is liked must become more frequent, and the KL grow from 0."""
    run = run_of(algorithm)
    lesson = lesson_of(run, algorithm, **settings)
    results = [lesson.take_step(run, PLAN, False) for _ in range(n_steps)]
    first, last = results[0].extras, results[-1].extras
    assert not any(result.metrics.skipped for result in results)
    assert abs(first["kl"]) < 1e-5
    assert first["reward"] + 0.2 < last["reward"]
    assert last["kl"] > 0.1
    assert (run.state.step, run.state.tokens_seen) == (n_steps, n_steps * PLAN.batch_tokens)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_rewards_rise(algorithm):
    """Each algorithm learns what is liked in a few steps."""
    check_that_rewards_rise(4, algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("settings", [{"updates": 3}, {"importance": "sequence"}, {"reduction": "grpo"}], ids=str)
def test_rewards_rise_in_every_form(algorithm, settings):
    """Also with several updates for a rollout, with ratios of sequences, and with another mean over tokens."""
    check_that_rewards_rise(12, algorithm, **settings)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_flat_groups_move_nothing(algorithm):
    """Not even weight decay or old moments do, where all answers are worth the same and there is no KL."""
    run = run_of(algorithm)
    lesson_of(run, algorithm).take_step(run, PLAN, False)
    before = weights_of(run)
    flat = lambda rollout, prompts, answers: [0.35] * len(answers)  # noqa: E731
    result = lesson_of(run, algorithm, flat, kl_weight=0.0).take_step(run, PLAN, False)
    assert all(map(torch.equal, before, weights_of(run)))
    assert result.metrics.grad_norm == 0
    assert result.extras["flat_groups"] == 1
    assert run.state.step == 2


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_micro_batches_give_the_same_step(algorithm):
    """The batch in one piece, and in pieces of some rows."""
    runs = [run_of(algorithm, micro_batch_tokens) for micro_batch_tokens in (10_000, 40)]
    results = [lesson_of(run, algorithm).take_step(run, PLAN, False) for run in runs]
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(*(getattr(result.metrics, name) for result in results), atol=1e-6, rtol=1e-4)
    assert results[0].router_stats.tokens_per_expert.equal(results[1].router_stats.tokens_per_expert)
    torch.testing.assert_close(results[0].router_stats.router_z_loss, results[1].router_stats.router_z_loss.detach())


def test_a_step_is_a_closed_form():
    """From the same state it ends with the same bytes, whatever torch's generator did, as after a resume."""
    run = run_of("ppo")
    lesson = lesson_of(run, "ppo")
    lesson.take_step(run, PLAN, False)
    resumed = copy.deepcopy(run.state)
    lesson.take_step(run, PLAN, False)
    expected = weights_of(run)
    torch.manual_seed(123)
    old_optimizer, run.state = run.state.optimizer, resumed
    assert run.state.optimizer is not old_optimizer
    lesson.take_step(run, PLAN, False)
    assert all(map(torch.equal, expected, weights_of(run)))


def test_each_pass_has_every_prompt_once():
    """In another order, wherever the steps begin."""
    order = ItemOrder(6, 10, seed=3)
    both = order.take(0, 12)
    assert order.take(0, 5) + order.take(50, 7) == both
    assert sorted(both[:6]) == sorted(both[6:]) == list(range(6))
    assert len({tuple(order.take(60 * i, 6)) for i in range(5)}) > 1
    assert order.locate(75)[1:] == (1, both[7], 5)


def test_answers_without_an_end_get_a_fixed_reward():
    """Where it is set; the others keep theirs."""
    rewards = lambda rollout, prompts, answers: [1.0] * len(answers)  # noqa: E731
    run = run_of()
    told = lesson_of(run, reward=rewards, missing_end_reward=-1.0).take_step(run, PLAN, False).extras
    assert told["reward"] == pytest.approx(2 * told["ended"] - 1)
    assert 0 < told["ended"] < 1


@pytest.mark.parametrize("wrong", [math.nan, None])
def test_a_reward_that_is_no_number_moves_nothing(wrong):
    """The message has the prompt's row."""
    run = run_of()
    before = weights_of(run)
    with pytest.raises(InputError, match="prompt row 2, answer 1 "):
        lesson_of(run, reward=lambda r, p, answers: [0.0] * 8 + [wrong] + [0.0] * 23).take_step(run, PLAN, False)
    assert all(map(torch.equal, before, weights_of(run)))


def test_bad_settings_are_refused():
    """A KL without a reference, and batches that are not whole groups."""
    run = run_of()
    with pytest.raises(InputError, match=r"rl.kl_weight=0.1 needs a reference"):
        Reinforcement(settings_of(), PROMPTS, None, None, frozenset())
    with pytest.raises(InputError, match=r"multiple of 8 \(rl.samples\), got 372 / 12 = 31"):
        lesson_of(run).take_step(run, PLAN._replace(batch_tokens=12 * 31), False)


def test_an_actor_and_its_critic_are_two():
    """The policy computes what it did, its layers are its own, and the optimizer has the parameters of both."""
    policy, reward = tiny_model(), RewardModel.from_model(tiny_model(seed=1))
    both = ActorCritic.of(policy, reward)
    tokens = torch.tensor([[5, 6, 7]])
    assert both(tokens).logits.equal(policy(tokens).logits)
    assert both.value(tokens).logits.equal(reward(tokens).logits)
    assert len(both.moe_layers()) == len(policy.moe_layers()) == 2
    n_parameters = sum(len(list(model.parameters())) for model in (policy, reward))
    assert len(build_optimizer(both, OptimizerConfig()).methods) == n_parameters


def test_a_value_is_that_before_its_token():
    """It does not depend on the token, or PPO's baseline would be biased; it does depend on the one before."""
    both = ActorCritic.of(tiny_model(), RewardModel.from_model(tiny_model(seed=1)))
    rollout = sample(both, [[5, 6], [7]], 4, 3, {0}, seed=0, step=0)
    values = values_of(both, rollout)

    def with_other(column: int) -> torch.Tensor:
        tokens = rollout.tokens.clone()
        tokens[:, column] = (tokens[:, column] + 1) % 61
        return values_of(both, rollout._replace(tokens=tokens))

    assert values.shape == rollout.is_answer.shape
    assert with_other(-1).equal(values)
    assert not with_other(-2)[:, -1].equal(values[:, -1])
