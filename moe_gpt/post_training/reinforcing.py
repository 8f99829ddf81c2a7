"""The stage of reinforcement: its prompts, its rewards, the models beside the policy, and its scores."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_gpt.config import RunConfig, SourceConfig
from moe_gpt.config.post_training import RlConfig
from moe_gpt.data.corpus import expand_files
from moe_gpt.data.prepare import PreparedData
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.chat import plain_text, render
from moe_gpt.post_training.conversations import read_prompts
from moe_gpt.post_training.fitting import Limit, fitting, left_out
from moe_gpt.post_training.lines import line_ends, line_prompts
from moe_gpt.post_training.policy import kl_estimate
from moe_gpt.post_training.pretraining_mix import PretrainingMix
from moe_gpt.post_training.reinforcement import Prompt, Reinforcement, Reward
from moe_gpt.post_training.reward_model import ActorCritic, RewardModel, load_reward_model
from moe_gpt.post_training.rewards import RULES, Rule
from moe_gpt.post_training.rollout import Rollout, answers_of, require_exact, sample, score
from moe_gpt.post_training.scores import Score, mean, share
from moe_gpt.post_training.starting import (
    describe_forgetting,
    held_out_fraction,
    model_at_start,
    present,
    require_marks,
    settle,
    split_items,
    text_of_pretraining,
)
from moe_gpt.post_training.update import Items, check_steps
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.stage import Say, Stage, Start
from moe_gpt.training.step import StepResult

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

_N_SCORED, _AT_ONCE = 256, 32
_N_NORMALISED = 64
"""Prompts whose answers by the model at the start normalise a reward model."""


@dataclasses.dataclass(frozen=True)
class Prompts(Items):
    """Prompts, and what a step needs to reward their answers."""

    name = "prompts"
    reinforcement: Reinforcement
    start: MoEGPT
    """The model at the start, from which scores measure the KL."""
    n_left_out: int
    """Prompts that leave no room for an answer."""

    def describe(self, run: Run) -> Iterator[str]:
        """Yield lines for people."""
        rl, passes = self.reinforcement.config, run.passes["prompts"]
        yield (
            f"           {len(self.items):,} prompts, {rl.samples} answers of at most "
            f"{rl.max_new_tokens} tokens to each, about {passes:.1f} passes; {len(self.held_out):,} are held out"
            + left_out(self.n_left_out)
        )
        yield describe_forgetting(self.data)


def prepare(config: RunConfig, start: Start, say: Say) -> Prompts:
    """Return the prompts of a run with their rewards."""
    rl, tokenizer = present(config.rl), present(start.tokenizer)
    row_tokens = min(stage.seq_len for stage in config.schedule.stages)
    require_exact(config.model)
    check_steps(config, rl.samples, "rl.samples")
    limit = Limit(
        "the prompt has", row_tokens - rl.max_new_tokens, "schedule.stages.0.seq_len - rl.max_new_tokens",
        "rl.prompts.on_too_long", rl.prompts.on_too_long,
    )  # fmt: skip
    if rl.prompts.builtin:
        training, held_out, n_left_out = _lines(tokenizer, held_out_fraction(config.data), limit)
        ends = line_ends(tokenizer)
    else:
        training, held_out, n_left_out = _read(rl, tokenizer, limit)
        ends = frozenset([tokenizer.end_of_text_id, require_marks(tokenizer, "prompts of files")])
    model = model_at_start(start)
    reward = _by_model(rl, model, training, ends, config, tokenizer) if rl.reward_model else _by_rules(rl)
    decode = functools.partial(plain_text, tokenizer=tokenizer) if rl.prompts.files else tokenizer.decode
    gold = RULES if rl.prompts.builtin else {}
    data = PreparedData(tokenizer, text_of_pretraining(config, tokenizer, say, rl.pretraining_weight > 0))
    mix = PretrainingMix.of(rl, config, data)
    reinforcement = Reinforcement(rl, training, reward, decode, ends, model, gold, mix)
    return Prompts(data, training, held_out[:_N_SCORED], row_tokens * rl.samples, reinforcement, model, n_left_out)


def _lines(tokenizer: Tokenizer, fraction: float, limit: Limit) -> tuple[list[Prompt], list[Prompt], int]:
    """Return the built-in prompts for training, held-out ones, and how many are left out."""
    sides, n_left_out = list[list[Prompt]](), 0
    for is_held_out in (False, True):
        found = [Prompt(tokenizer.encode(text), text) for text in line_prompts(is_held_out, fraction)]
        places = [f"prompt {number} of the built-in lines" for number in range(1, len(found) + 1)]
        kept, n = fitting(found, [len(prompt.ids) for prompt in found], places, limit)
        sides.append(kept)
        n_left_out += n
    return sides[0], sides[1], n_left_out


def _read(rl: RlConfig, tokenizer: Tokenizer, limit: Limit) -> tuple[list[Prompt], list[Prompt], int]:
    """Return the prompts of files, as ``_lines``; the text of each is its right answer with the messages."""
    require_marks(tokenizer, "prompts of files")
    rows = read_prompts(expand_files(SourceConfig(name="prompts", files=rl.prompts.files)))
    found = [
        Prompt(render(row.prompt, tokenizer, True).ids, json.dumps([row.answer, *map(dict, row.prompt)]))
        for row in rows
    ]  # fmt: skip
    kept, n_left_out = fitting(found, [len(prompt.ids) for prompt in found], [row.place for row in rows], limit)
    return *split_items(kept, lambda prompt: repr(prompt.ids)), n_left_out


def right_answer(prompt: str, answer: str) -> float:
    """Return 1 where an answer to a prompt of files is the right one but for outer blanks, else 0."""
    return float(answer.strip() == json.loads(prompt)[0].strip())


def _by_rules(rl: RlConfig) -> Reward:
    rules = [(given.weight, _rule(given.rule, bool(rl.prompts.files))) for given in rl.rewards]
    return lambda rollout, prompts, answers: [
        sum(weight * rule(prompt, answer) for weight, rule in rules)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _rule(name: str, is_of_files: bool) -> Rule:
    known = {right_answer.__name__: right_answer} if is_of_files else RULES
    if name not in known:
        raise InputError(f"rl.rewards: with these prompts, rule must be {', '.join(known)}, got {name}")
    return known[name]


def _by_model(
    rl: RlConfig,
    model: MoEGPT,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    config: RunConfig,
    tokenizer: Tokenizer,
) -> Reward:
    """Return the scores of a reward model, normalised on answers of the model at the start."""
    judge = load_reward_model(present(rl.reward_model), tokenizer=tokenizer)
    asked = [prompts[number % len(prompts)] for number in range(_N_NORMALISED)]  # again where there are few
    scores = [
        _scores(judge, _sampled(model, asked[first : first + _AT_ONCE], rl, ends, config, first))
        for first in range(0, _N_NORMALISED, _AT_ONCE)
    ]
    judge.normalise(torch.cat(scores))
    return lambda rollout, prompts, answers: _scores(judge, rollout).tolist()


@torch.no_grad()
def _scores(judge: RewardModel, rollout: Rollout) -> Tensor:
    return judge.to(rollout.tokens.device).scores(rollout.tokens, rollout.valid)[0]


def _sampled(
    model: MoEGPT, prompts: Sequence[Prompt], rl: RlConfig, ends: frozenset[int], config: RunConfig, first: int
) -> Rollout:
    """Return one answer to each prompt, the same for every model that asks."""
    ids = [prompt.ids for prompt in prompts]
    seed = config.train.seed + 1  # not the training's
    return sample(
        model, ids, 1, rl.max_new_tokens, ends, seed=seed, step=0, first_row=first, temperature=rl.temperature
    )


def score_lines(run: Run, model: MoEGPT) -> dict[str, Score]:
    """Return what sampled answers to held-out prompts are like.

    ``parses`` and ``uses_argument`` are shares of the answers, ``distinct`` is the share of different ones among those
    that parse, and ``kl`` is the mean of ln p / p_start of an answer, in nats. Of files, ``right_answer`` is a share.
    """
    material = _prompts(run)
    step, held_out = material.reinforcement, material.held_out
    pairs, kls = list[tuple[str, str]](), list[float]()
    for first in range(0, len(held_out), _AT_ONCE):
        part = held_out[first : first + _AT_ONCE]
        rollout = _sampled(model, part, step.config, step.ends, run.config, first)
        pairs += zip([prompt.text for prompt in part], map(step.decode, answers_of(rollout)), strict=True)
        kls += _kls(model, material.start, rollout, step.config.temperature)
    if not pairs:
        return {}
    return {**(_judged_lines(pairs) if step.gold else _judged(pairs, right_answer)), "kl": mean(kls)}


def line_answers(run: Run, model: MoEGPT, n: int) -> list[dict[str, Any]]:
    """Return a sampled answer to each of the first ``n`` held-out prompts, as texts, with the right one of files."""
    pairs, step = _sampled_answers(run, model, n), _prompts(run).reinforcement
    return [{**_told(prompt.text, bool(step.gold)), "answer": step.decode(answer)} for prompt, answer in pairs]


def _prompts(run: Run) -> Prompts:
    assert isinstance(run.material, Prompts), "the stage has prepared them"
    return run.material


def _sampled_answers(run: Run, model: MoEGPT, n: int) -> Iterable[tuple[Prompt, list[int]]]:
    """Return the first ``n`` held-out prompts, each with an answer."""
    step, prompts = _prompts(run).reinforcement, _prompts(run).held_out[:n]
    if not prompts:
        return []
    return zip(prompts, answers_of(_sampled(model, prompts, step.config, step.ends, run.config, 0)), strict=True)


def _told(text: str, is_line: bool) -> dict[str, Any]:
    """Return what a prompt's text says; of files it is JSON."""
    if is_line:
        return {"prompt": text}
    expected, *messages = json.loads(text)
    return {"prompt": messages[-1]["content"], "expected": expected}


def line_rows(run: Run, n: int) -> list[list[int]]:
    """Return the tokens of ``n`` held-out prompts, each with an answer of the model at the start."""
    start = _prompts(run).start.to(run.device)
    return [[*prompt.ids, *answer] for prompt, answer in _sampled_answers(run, start, n)]


def _judged(pairs: Sequence[tuple[str, str]], rule: Rule) -> dict[str, Score]:
    return {rule.__name__: share([rule(*pair) == 1 for pair in pairs])}


def _judged_lines(pairs: Sequence[tuple[str, str]]) -> dict[str, Score]:
    """Return the share of each rule, and how many of the lines that parse are different."""
    found = functools.reduce(operator.or_, (_judged(pairs, rule) for rule in RULES.values()))
    good = [answer for prompt, answer in pairs if RULES["parses"](prompt, answer)]
    is_new = [answer not in good[:place] for place, answer in enumerate(good)]
    return {**found, "distinct": share(is_new)} if good else found


@torch.no_grad()
def _kls(model: MoEGPT, start: MoEGPT, rollout: Rollout, temperature: float) -> list[float]:
    own, other = (score(each, rollout, temperature).log_probs for each in (model, start.to(rollout.tokens.device)))
    return kl_estimate(own, other, rollout.is_answer, "k1").sum(1).tolist()


def _with_value_model(config: RunConfig, model: MoEGPT) -> MoEGPT:
    """Return the policy; for PPO with a value model that starts as the reward model or, without one, as the policy."""
    rl = present(config.rl)
    if rl.algorithm != "ppo":
        return model
    value = RewardModel.from_model(model)
    return ActorCritic.of(model, _like(value, rl.reward_model) if rl.reward_model else value)


def _like(value: RewardModel, path: str) -> RewardModel:
    """Return the reward model at a path, which must have a value model's shape."""
    judge = load_reward_model(path)
    if _shapes(judge) != _shapes(value):
        raise InputError(
            f"rl.reward_model={path} must have the policy's shape, because PPO's value model starts with its weights; "
            "train it with the same --init-from, or use rl.algorithm=rloo"
        )
    return judge


def _shapes(model: MoEGPT) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def take_step(run: Run, plan: StepPlan, should_record: bool) -> StepResult:
    """Take a step of reinforcement."""
    return _prompts(run).reinforcement.take_step(run, plan, should_record)


RL = Stage(settle, prepare, _with_value_model, take_step)
