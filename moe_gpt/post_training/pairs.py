"""Pairs of answers to learn from: those of files, or sampled lines of which a rule prefers one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.chat import TURN_END, Message, mark, render
from moe_gpt.post_training.conversations import Pair
from moe_gpt.post_training.rewards import Rule
from moe_gpt.post_training.rollout import Rollout, answers_of, sample

_PROMPTS_AT_ONCE = 32


class PairOfAnswers(NamedTuple):
    """Two answers to a prompt, in tokens; the first is the better one."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def encode_pair(pair: Pair, tokenizer: Tokenizer) -> PairOfAnswers:
    """Return a pair as the tokens of a conversation; an answer ends with the end of its turn.

    Raises:
        InputError: where both answers are the same tokens, as those are that differ in outer blanks alone.
    """
    opened = render(pair.prompt, tokenizer, add_generation_prompt=True).ids
    chosen, rejected = (_answer(pair.prompt, given, tokenizer) for given in (pair.chosen, pair.rejected))
    if chosen == rejected:
        raise InputError(
            f"{pair.place}: chosen and rejected must differ by more than blanks around them, got the same tokens twice"
        )
    return PairOfAnswers(opened, chosen, rejected)


def _answer(prompt: Sequence[Message], answer: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    opened, whole = (render(m, tokenizer, g).ids for m, g in ((prompt, True), ([*prompt, *answer], False)))
    end = len(whole) - whole[::-1].index(mark(TURN_END, tokenizer))
    return whole[len(opened) : end]


def sampled_pairs(
    model: MoEGPT,
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    rule: Rule,
    ends: frozenset[int],
    n_samples: int,
    max_new_tokens: int,
    seed: int,
) -> Iterator[PairOfAnswers]:
    """Yield, of each prompt's sampled answers, one that a rule likes and one that it does not, as often as both exist.

    Args:
        model: samples at temperature 1.
        prompts: texts.
        rule: 1 for an answer that it likes, 0 for another.
        ends: tokens that end an answer.
    """
    for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
        texts = prompts[first : first + _PROMPTS_AT_ONCE]
        ids = [tokenizer.encode(text) for text in texts]
        rollout = sample(
            model, ids, n_samples, max_new_tokens, ends, seed=seed, step=0, first_row=first * n_samples
        )  # fmt: skip
        answers = answers_of(rollout)
        for number, (text, prompt) in enumerate(zip(texts, ids, strict=True)):
            mine = answers[number * n_samples : (number + 1) * n_samples]
            likes = [rule(text, tokenizer.decode(answer)) == 1 for answer in mine]
            good = itertools.compress(mine, likes)
            bad = itertools.compress(mine, [not is_good for is_good in likes])
            yield from (PairOfAnswers(prompt, *both) for both in zip(good, bad, strict=False))


def as_rollout(pairs: Sequence[PairOfAnswers], device: torch.device) -> Rollout:
    """Return pairs as rows (2N, S), as if they had been sampled: the chosen answers first, then the rejected ones."""
    prompts = [pair.prompt for pair in pairs] * 2
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    P, N = max(map(len, prompts)), max(map(len, answers))
    rows = [[0] * (P - len(p)) + p + a + [0] * (N - len(a)) for p, a in zip(prompts, answers, strict=True)]
    places = torch.arange(P + N)
    starts, stops = (torch.tensor(x)[:, None] for x in ([P - len(p) for p in prompts], [P + len(a) for a in answers]))
    valid = (places >= starts) & (places < stops)
    is_answer = valid[:, P:]
    parts = (torch.tensor(rows), valid, is_answer, torch.zeros(is_answer.shape))
    return Rollout(*(part.to(device) for part in parts))
