"""One step of reinforcement: sample answers, reward them, compare them, and move the policy. A step of ``train``.

GRPO (arXiv 2402.03300) compares the answers of a prompt and has the KL in the loss. RLOO (arXiv 2402.14740) and PPO
(InstructGPT, arXiv 2203.02155) have it in the reward; PPO compares with a value model. A step is a closed form of the
config and ``tokens_seen``: which prompts it takes, and what it samples, so a killed run resumes to the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_gpt.config.post_training import RlConfig
from moe_gpt.errors import InputError
from moe_gpt.model.losses import LossTerms, RouterStats, combine_losses
from moe_gpt.model.router import Routing
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.policy import (
    checked_rewards,
    gae,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    policy_loss,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)
from moe_gpt.post_training.pretraining_mix import PretrainingMix
from moe_gpt.post_training.reward_model import ActorCritic
from moe_gpt.post_training.rewards import Rule
from moe_gpt.post_training.rollout import Rollout, Scored, answers_of, replaying, sample, score
from moe_gpt.post_training.update import ItemOrder, count_step, rows_of_step, total, update, weighted
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.setup import Run
from moe_gpt.training.step import StepMetrics, StepResult


class Prompt(NamedTuple):
    """What an answer is wanted for."""

    ids: list[int]
    text: str


Reward = Callable[[Rollout, Sequence[str], Sequence[str]], Sequence[float | None]]
"""Takes a rollout, and the texts of prompts and answers, one for each row; returns their rewards."""


class RolloutMetrics(NamedTuple):
    """What a step's answers were like."""

    reward: float
    """Mean, before the KL."""
    kl: float
    """Mean over answers of the sum over tokens of ln p / p_reference, in nats; 0 without a reference."""
    length: float
    """Mean tokens of an answer."""
    entropy: float
    """Mean over tokens, in nats."""
    ended: float
    """Share of the answers that ended."""
    distinct: float
    """Different answers over answers."""
    flat_groups: float
    """Share of the prompts whose answers have equal rewards, from which GRPO and RLOO learn nothing."""


class Lesson(NamedTuple):
    """A rollout with all that the loss needs; of each row, so that rows can be learned in parts."""

    rollout: Rollout
    old_log_probs: Tensor
    reference_log_probs: Tensor
    weights: Tensor
    advantages: Tensor
    """(B, N); those of GRPO and RLOO are equal in a row."""
    old_values: Tensor
    returns: Tensor

    def rows(self, start: int, end: int) -> Lesson:
        """Return some of the rows."""
        return Lesson(self.rollout.rows(start, end), *(part[start:end] for part in self[1:]))


@dataclasses.dataclass(frozen=True)
class Reinforcement:
    """What a step needs beside the run; ``take_step`` is the run's step function. PPO's model is an ``ActorCritic``.

    Raises:
        InputError: where there is a KL and no reference.
    """

    config: RlConfig
    prompts: Sequence[Prompt]
    reward: Reward
    decode: Callable[[list[int]], str]
    ends: frozenset[int]
    """Tokens that end an answer."""
    reference: MoEGPT | None = None
    """The model at the start; None where ``kl_weight`` is 0."""
    gold: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    """Rules whose means over a step's answers are recorded, whatever is rewarded."""
    mix: PretrainingMix | None = None
    """The loss on pre-training's text, if it is added."""

    def __post_init__(self) -> None:
        if self.config.kl_weight and self.reference is None:
            raise InputError(f"rl.kl_weight={self.config.kl_weight} needs a reference model, got none; set it to 0")

    def take_step(self, run: Run, plan: StepPlan, should_record: bool) -> StepResult:
        """Sample, reward, learn. Where no answer has an advantage and the loss has no KL, nothing moves."""
        config, seed = self.config, run.config.train.seed
        n_prompts = rows_of_step(plan.batch_tokens, plan.seq_len, config.samples, "rl.samples") // config.samples
        order = ItemOrder(len(self.prompts), plan.seq_len * config.samples, seed)
        prompts = [self.prompts[number] for number in order.take(run.state.tokens_seen, n_prompts)]
        rollout = sample(
            run.state.model, [prompt.ids for prompt in prompts], config.samples, config.max_new_tokens, self.ends,
            seed=seed, step=run.state.step, temperature=config.temperature, precision=run.precision,
        )  # fmt: skip
        texts = [prompt.text for prompt in prompts for _ in range(config.samples)]
        answers = [self.decode(answer) for answer in answers_of(rollout)]
        rewards = self._rewards(rollout, self.reward(rollout, texts, answers))
        lesson, metrics = self._lesson(run, rollout, rewards)
        result = StepResult(StepMetrics(*torch.zeros(len(StepMetrics._fields), device=run.device)), None, None)
        if lesson.advantages.any() or self._has_other_loss():
            result = self._learn(run, plan, lesson)
        count_step(run, plan)
        gold = {name: statistics.fmean(map(rule, texts, answers)) for name, rule in self.gold.items()}
        return result._replace(extras={**metrics._asdict(), **gold, **result.extras})

    def _has_other_loss(self) -> bool:
        return self.mix is not None or (self.config.kl_weight > 0 and self.config.algorithm == "grpo")

    def _rewards(self, rollout: Rollout, given: Sequence[float | None]) -> Tensor:
        """Return the rewards (P, S)."""
        config = self.config
        rewards = checked_rewards([given[i : i + config.samples] for i in range(0, len(given), config.samples)])
        if config.missing_end_reward is None:
            return rewards
        return torch.where(self._has_ended(rollout).view_as(rewards), rewards, config.missing_end_reward)

    def _has_ended(self, rollout: Rollout) -> Tensor:
        ends = torch.tensor(sorted(self.ends), device=rollout.tokens.device)
        return (torch.isin(rollout.answers, ends) & rollout.is_answer).any(1).cpu()

    @torch.no_grad()
    def _lesson(self, run: Run, rollout: Rollout, rewards: Tensor) -> tuple[Lesson, RolloutMetrics]:
        """Compare the answers."""
        config, mask = self.config, rollout.is_answer
        scored = score(run.state.model, rollout, config.temperature, run.precision)
        reference = scored.log_probs
        if self.reference is not None:
            reference = score(self.reference.to(mask.device), rollout, config.temperature, run.precision).log_probs
        kl = kl_estimate(scored.log_probs, reference, mask, "k1")
        lesson = Lesson(
            rollout, scored.log_probs, reference, token_weights(mask, config.reduction, config.max_new_tokens),
            *self._compare(run, rollout, rewards, kl),
        )  # fmt: skip
        different = {tuple(answer[m].tolist()) for answer, m in zip(rollout.answers, mask, strict=True)}
        is_flat = (rewards == rewards[:, :1]).all(1)
        numbers = (
            rewards.mean(), kl.sum(1).mean(), mask.sum(1).float().mean(), scored.entropy.sum() / mask.sum(),
            self._has_ended(rollout).float().mean(), len(different) / len(mask), is_flat.float().mean(),
        )  # fmt: skip
        return lesson, RolloutMetrics(*(float(number) for number in numbers))

    def _compare(self, run: Run, rollout: Rollout, rewards: Tensor, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return advantages, the value model's numbers and what it learns, (B, N); the last two are 0 without one."""
        config, mask = self.config, rollout.is_answer
        if config.algorithm == "ppo":
            values = values_of(run.state.model, rollout)
            each = token_rewards(rewards.flatten().to(kl), kl, mask, config.kl_weight)
            advantages, returns = gae(each, values, mask, config.gamma, config.lam)
            return whiten(advantages, mask), values, returns
        if config.algorithm == "rloo":
            of_answers = leave_one_out_advantages(rewards - config.kl_weight * kl.sum(1).cpu().view_as(rewards))
        else:
            of_answers = group_advantages(rewards, config.scale_rewards)
        advantages = torch.where(mask, of_answers.view(-1, 1).to(kl), 0.0)
        return advantages, torch.zeros_like(kl), torch.zeros_like(kl)

    def _learn(self, run: Run, plan: StepPlan, lesson: Lesson) -> StepResult:
        """Update the policy, maybe several times, with the experts of the first time."""
        recorded, extras = list[list[Routing]](), dict[str, float]()
        n_rows = max(1, run.config.train.micro_batch_tokens // lesson.rollout.tokens.shape[1])
        parts = [lesson.rows(first, first + n_rows) for first in range(0, len(lesson.weights), n_rows)]
        run.state.model.train()
        for number in range(self.config.updates):
            of_text = self.mix.add_gradients(run, plan, number) if self.mix else None
            terms, stats = self._add_gradients(run, parts, recorded)
            if self.mix and of_text:
                terms = terms._replace(loss=terms.loss + self.mix.weight * of_text.loss)
                extras = {"pretraining_loss": float(of_text.ce_loss)}
            result = update(run, plan.lr, terms, stats)
        return result._replace(extras=extras)

    def _add_gradients(
        self, run: Run, parts: list[Lesson], recorded: list[list[Routing]]
    ) -> tuple[LossTerms, RouterStats | None]:
        """Add the gradients of all parts; keep their routes in ``recorded``, or follow those that are there."""
        is_first, all_terms, all_stats = not recorded, list[Tensor](), list[RouterStats]()
        n_tokens = torch.stack([part.rollout.valid.sum() for part in parts]).sum()
        for number, part in enumerate(parts):
            with contextlib.nullcontext() if is_first else replaying(run.state.model, recorded[number]):
                terms, scored = self._loss(run, part, part.rollout.valid.sum() / n_tokens)
                terms.loss.backward()
            all_terms.append(torch.stack(terms).detach())
            all_stats += filter(None, [scored.router_stats])
            if is_first and self.config.updates > 1:
                recorded.append([Routing(*(tensor.detach() for tensor in routing)) for routing in scored.routings])
        return LossTerms(*torch.stack(all_terms).sum(0)), total(all_stats)

    def _loss(self, run: Run, part: Lesson, share: Tensor) -> tuple[LossTerms, Scored]:
        """Return the loss of some rows, with the routers' losses weighted by the rows' share of the tokens."""
        config, mask, model = self.config, part.rollout.is_answer, run.state.model
        scored = score(model, part.rollout, config.temperature, run.precision)
        loss = policy_loss(
            scored.log_probs, part.old_log_probs, part.advantages, mask, part.weights,
            clip=config.clip, importance=config.importance, kl_weight=config.kl_weight, kl=config.kl,
            reference_log_probs=part.reference_log_probs if config.algorithm == "grpo" else None,
        )  # fmt: skip
        if config.algorithm == "ppo":
            error = value_loss(
                values_of(model, part.rollout), part.old_values, part.returns, mask, part.weights, config.clip
            )
            loss = loss + config.value_weight * error
        stats = weighted(scored.router_stats, share) if scored.router_stats else None
        scored = scored._replace(router_stats=stats)
        balancing, z_loss = stats[:2] if stats else (None, None)
        return combine_losses(loss, balancing, z_loss, model.config, run.config.loss), scored


def values_of(model: MoEGPT, rollout: Rollout) -> Tensor:
    """Return an ``ActorCritic``'s values before each token of the answers, (B, N)."""
    assert isinstance(model, ActorCritic), "PPO's model has a value model beside it"
    n = rollout.is_answer.shape[1]
    return model.value.values(rollout.tokens, rollout.valid)[0][:, -n - 1 : -1]
