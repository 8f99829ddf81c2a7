"""Speculation: what it guesses, and that sampled answers keep their distribution."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from moe_gpt.config import ModelConfig
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.request import Request
from moe_gpt.inference.running import Running
from moe_gpt.inference.sampling import SamplingConfig, next_token_probs
from moe_gpt.inference.speculation import Draft, DraftModel, Guesses, PromptLookup, verify
from moe_gpt.model.transformer import MoEGPT

PLAIN = SamplingConfig(temperature=1)


def chi_square(counts: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> float:
    """Return (χ² - degrees of freedom) / √(2 · degrees): about a standard normal number where they agree.

    Outcomes that are expected fewer than five times are taken together.
    """
    n = sum(counts.values())
    assert all(expected[outcome] > 0 for outcome in counts)
    often = [outcome for outcome, p in expected.items() if n * p >= 5]
    pairs = [(counts.get(outcome, 0), n * expected[outcome]) for outcome in often]
    pairs.append((n - sum(count for count, _ in pairs), n - sum(p for _, p in pairs)))
    total = sum((count - p) ** 2 / p for count, p in pairs if p > 1e-6)
    degrees = len(often) - 1 + (pairs[-1][1] > 1e-6)
    return (total - degrees) / math.sqrt(2 * degrees)


def test_prompt_lookup_guesses_what_followed_the_same_words_last():
    """The latest occurrence counts, the answer is searched too, and the last token of an answer is not guessed."""
    lookup = PromptLookup(3, 2)
    sequence = Running(0, Request(prompt=[1, 2, 3, 4, 1, 2, 5, 6, 7, 1, 2], max_new_tokens=9), 100)
    assert lookup.propose([sequence])[0].tokens == [5, 6, 7]
    sequence.accept(3)
    sequence.accept(4)
    assert lookup.propose([sequence])[0].tokens == [1, 2, 5]
    sequence.limit = len(sequence.tokens) + 2
    assert lookup.propose([sequence])[0].tokens == [1]
    assert lookup.propose([Running(0, Request(prompt=[1]), 100)])[0].tokens == []


def first_tokens(q: torch.Tensor, says: torch.Tensor, n: int) -> dict[tuple[int, ...], int]:
    """Return how often each first token comes, where guesses are drawn from q and ``says`` is told."""
    logits = torch.tensor([[0.3, 1.2, -0.5, 0.9], [0.0, 0.0, 0.0, 0.0]])
    rng, counts = random.Random(0), {}
    for _ in range(n):
        guess = rng.choices(range(4), q.tolist())[0]
        token = verify(logits, Guesses([guess], says[None]), PLAIN, rng)[0]
        counts[(token,)] = counts.get((token,), 0) + 1
    return counts


def test_verified_guesses_have_the_models_distribution():
    """Whatever the draft's distribution is, provided that it tells the truth about it."""
    p = next_token_probs(torch.tensor([[0.3, 1.2, -0.5, 0.9]]), [PLAIN])[0]
    expected = {(token,): float(p[token]) for token in range(4)}
    q = torch.tensor([0.7, 0.1, 0.1, 0.1])
    assert chi_square(first_tokens(q, q, 4000), expected) < 4
    uniform = torch.full((4,), 0.25)
    assert chi_square(first_tokens(q, uniform, 4000), expected) > 10  # a draft that lies is found out


def tiny(**changes: object) -> MoEGPT:
    """Return a model of five tokens."""
    torch.manual_seed(3)
    shape = {"vocab_size": 5, "n_layers": 1, "d_model": 16, "n_heads": 2, "head_dim": 8, "d_ff": 16, "n_experts": 4}
    return MoEGPT(ModelConfig(**(shape | {"max_seq_len": 16, "init_std": 0.5} | changes))).eval()


def enumerate_answers(model: MoEGPT, prompt: list[int], sampling: SamplingConfig) -> dict[tuple[int, ...], float]:
    """Return the probability of every answer of three tokens."""
    found = {}
    with torch.no_grad():
        for answer in itertools.product(range(5), repeat=3):
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            probs = next_token_probs(logits, [sampling] * 3)
            found[answer] = math.prod(float(probs[index, token]) for index, token in enumerate(answer))
    return found


class Liar(DraftModel):
    """Says of its guesses that their distribution was the other way round."""

    def propose(self, sequences: list[Running]) -> list[Guesses]:
        """Return true guesses with a false distribution."""
        guesses = super().propose(sequences)
        return [guess._replace(probs=guess.probs.flip(-1)) if guess.tokens else guess for guess in guesses]


def counts_of_answers(model: MoEGPT, draft: Draft, sampling: SamplingConfig, n: int) -> dict[tuple[int, ...], int]:
    """Return how often each answer of three tokens comes in ``n`` requests that differ by their seed."""
    engine = Engine(model, n_rows=64, max_waiting=n, draft=draft)
    tokens = {engine.add(Request(prompt=[1, 2, 1], max_new_tokens=3, sampling=sampling, seed=s)): [] for s in range(n)}
    for event in engine.run():
        tokens[event.request_id].append(event.token)
    counts: dict[tuple[int, ...], int] = {}
    for answer in tokens.values():
        counts[tuple(answer)] = counts.get(tuple(answer), 0) + 1
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [PLAIN, SamplingConfig(temperature=1, top_p=0.9), SamplingConfig(temperature=1.3, top_k=3)],
    ids=["plain", "top_p", "top_k"],
)
@pytest.mark.parametrize("kind", ["draft", "lookup", "liar"])
def test_whole_answers_keep_their_distribution(kind, sampling):
    """4,000 answers of three tokens fit the enumerated distribution by chi-square; those of a lying draft do not."""
    model, smaller = tiny(), tiny(n_experts=1, top_k=1)
    drafts = {"draft": DraftModel(smaller, 2, 64), "lookup": PromptLookup(2, 1), "liar": Liar(smaller, 2, 64)}
    expected = enumerate_answers(model, [1, 2, 1], sampling)
    far = chi_square(counts_of_answers(model, drafts[kind], sampling, 4000), expected)
    assert far > 10 if kind == "liar" else far < 4
