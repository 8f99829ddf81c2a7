"""From logits to events: samples tokens, checks guesses, reports log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moe_gpt.inference.passes import Result
from moe_gpt.inference.request import Event, TokenExperts, TokenScore
from moe_gpt.inference.sampling import are_finite, sample
from moe_gpt.inference.speculation import Guesses, verify


def choose_tokens(results: Sequence[Result], guesses: dict[int, Guesses]) -> list[list[int]]:
    """Return the new tokens of each sequence that has read all it knows: as many guesses as hold, and one more.

    There are none where the logits are not finite.

    Args:
        results: of these sequences.
        guesses: of those that have some, by the request's number.
    """
    if not results:
        return []
    logits = torch.cat([result.sampled for result in results])
    lengths = [len(result.sampled) for result in results]
    owners = [(result.work.running, ahead) for result, n in zip(results, lengths, strict=True) for ahead in range(n)]
    samplings = [running.request.sampling for running, _ in owners]
    drawn = sample(logits, samplings, [running.uniform(ahead) for running, ahead in owners])
    parts = zip(results, drawn.split(lengths), are_finite(logits).split(lengths), strict=True)
    return [
        _choose(result, tokens.tolist(), guesses.get(result.work.running.id)) if is_finite.all() else []
        for result, tokens, is_finite in parts
    ]


def _choose(result: Result, drawn: list[int], guesses: Guesses | None) -> list[int]:
    """Return the new tokens of a sequence.

    Where no distribution of the guesses is known, these are the tokens that plain decoding draws with the same random
    numbers, up to the first that was not guessed: what follows it was computed for another text.
    """
    running, n_right = result.work.running, 0
    if guesses is not None and guesses.probs is not None and running.request.sampling.temperature > 0:
        return verify(result.sampled, guesses, running.request.sampling, running.rng)
    expected = result.work.tokens[result.work.n_known :]
    while n_right < len(expected) and drawn[n_right] == expected[n_right]:
        n_right += 1
    return drawn[: n_right + 1]


def tell(result: Result, tokens: Sequence[int]) -> Iterator[Event]:
    """Let a sequence accept new tokens; yield an event for each, until the answer ends.

    Where no token is wanted, the one event tells of the end.
    """
    running, work = result.work.running, result.work
    scores, running.prompt_scores = running.prompt_scores or None, []
    if not running.request.max_new_tokens:
        yield running.end("length")._replace(prompt_scores=scores)
        return
    for index, token in enumerate(tokens):
        n_before, place = len(running.tokens), work.n_known - 1 + index
        text, finish = running.accept(token)
        is_part = len(running.tokens) > n_before  # end-of-text is not
        yield Event(
            running.id,
            token if is_part else None,
            text,
            finish,
            _score(result.sampled[index], token, running.request.n_logprobs if is_part else None),
            scores,
            TokenExperts(result.chosen, result.start + place),
        )
        scores = None
        if finish:
            return


def score_prompt(result: Result) -> None:
    """Add the log-probabilities of the prompt's tokens that this pass predicts, where asked for."""
    running = result.work.running
    if not running.scores_prompt:
        return
    if not running.prompt_scores:
        running.prompt_scores.append(TokenScore(running.tokens[0], None, []))
    first = running.n_cached + 1
    predicted = running.request.prompt[first : first + result.work.n_known]
    for logits, token in zip(result.logits, predicted, strict=False):
        if (score := _score(logits, token, running.request.n_logprobs or 0)) is not None:
            running.prompt_scores.append(score)


def _score(logits: Float[Tensor, "V"], token: int, n_top: int | None) -> TokenScore | None:
    if n_top is None:
        return None
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(n_top, len(logprobs)))
    return TokenScore(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
