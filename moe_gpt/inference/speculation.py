"""Speculative decoding: cheap guesses of the next tokens, which one pass of the model checks all at once.

Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318) showed that the answer keeps its
distribution; prompt lookup guesses what followed the same words before. A mixture of experts gains less than a dense
model: to check B tokens it reads Σ_e 1 - (1 - p_e)^B experts of a layer, where p_e is expert e's share of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from moe_gpt.errors import InputError
from moe_gpt.inference.passes import Work, run_pass
from moe_gpt.inference.rows import RowCache
from moe_gpt.inference.running import Running
from moe_gpt.inference.sampling import SamplingConfig, draw, next_token_probs
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import Precision


class Guesses(NamedTuple):
    """What a draft thinks that a sequence goes on with."""

    tokens: list[int]
    probs: Float[Tensor, "k V"] | None = None
    """The distributions from which the guesses were drawn; None where they were not drawn."""


NOTHING = Guesses([])


class Draft(Protocol):
    """Guesses tokens for sequences that decode."""

    def propose(self, sequences: Sequence[Running]) -> list[Guesses]:
        """Return guesses for each sequence, at most as many as its answer has room for, or none."""
        ...

    def require_fit(self, model: MoEGPT, n_rows: int) -> None:
        """Raise ``InputError`` where it cannot guess for an engine of this model and so many rows."""
        ...


class FitsAll:
    """A draft that can guess for every engine."""

    def require_fit(self, model: MoEGPT, n_rows: int) -> None:
        """Do nothing."""


class NoDraft(FitsAll):
    """Guesses nothing."""

    def propose(self, sequences: Sequence[Running]) -> list[Guesses]:
        """Return no guesses."""
        return [NOTHING] * len(sequences)


class PromptLookup(FitsAll):
    """Guesses that the last words are followed by what followed them before, in the prompt or in the answer.

    Args:
        n_guesses: tokens to guess.
        n_matching: how many last tokens must occur before.
    """

    def __init__(self, n_guesses: int = 4, n_matching: int = 2) -> None:
        self.n_guesses, self.n_matching = n_guesses, n_matching

    def propose(self, sequences: Sequence[Running]) -> list[Guesses]:
        """Return what followed the latest earlier occurrence of each sequence's last tokens."""
        return [Guesses(self._look_up(each.tokens)[: each.limit - len(each.tokens) - 1]) for each in sequences]

    def _look_up(self, tokens: list[int]) -> list[int]:
        n, last = self.n_matching, tokens[-self.n_matching :]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start] == last[0] and tokens[start : start + n] == last:
                return tokens[start + n : start + n + self.n_guesses]
        return []


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, which reads the same sequences in rows of its own.

    Args:
        model: put into evaluation mode.
        n_guesses: tokens to guess.
        n_rows: sequences at once, as many as the engine has rows.
        precision: compute type, the engine's.
    """

    def __init__(self, model: MoEGPT, n_guesses: int = 4, n_rows: int = 32, precision: Precision = "fp32") -> None:
        self.model, self.n_guesses, self.context = model.eval(), n_guesses, model.config.max_seq_len
        weight = model.embedding.weight
        dtype = torch.bfloat16 if precision == "bf16" else weight.dtype
        self._rows = RowCache(model.config, n_rows, self.context, weight.device, dtype)
        self.n_rows = n_rows
        self._readers: dict[Running, Running] = {}  # by the sequence that each follows

    def require_fit(self, model: MoEGPT, n_rows: int) -> None:
        """Raise ``InputError`` for a model with another vocabulary, or an engine with more rows."""
        sizes = self.model.embedding.num_embeddings, model.embedding.num_embeddings
        if sizes[0] != sizes[1]:
            raise InputError(f"the draft must have the model's vocabulary of {sizes[1]} tokens, got {sizes[0]}")
        if self.n_rows < n_rows:
            raise InputError(f"the draft must have as many rows as the engine, {n_rows}, got {self.n_rows}")

    def propose(self, sequences: Sequence[Running]) -> list[Guesses]:
        """Let the model go on with each sequence, drawing as the request asks for."""
        for ended in self._readers.keys() - set(sequences):
            self._rows.release(self._readers.pop(ended).row)
        readers = [self._follow(each) for each in sequences]
        room = [self._room(each) for each in sequences]
        probs: dict[int, list[Tensor]] = {reader.id: [] for reader in readers}
        for index in range(max(room, default=0)):
            self._guess_once([reader for reader, n in zip(readers, room, strict=True) if n > index], probs)
        return [self._guesses(reader, probs[reader.id]) for reader in readers]

    @staticmethod
    def _guesses(reader: Running, probs: list[Tensor]) -> Guesses:
        return Guesses(reader.tokens[len(reader.tokens) - len(probs) :], torch.stack(probs)) if probs else NOTHING

    def _room(self, sequence: Running) -> int:
        """Return how many tokens can be guessed: the answer's last one is never, nor what the draft cannot hold."""
        n = len(sequence.tokens)
        return min(self.n_guesses, sequence.limit - n - 1, self.context - n)

    def _follow(self, sequence: Running) -> Running:
        """Return the draft's reader of a sequence, which forgets the guesses that were wrong."""
        if (reader := self._readers.get(sequence)) is None:
            reader = self._readers[sequence] = Running(sequence.id, sequence.request, self.context)
            reader.row, reader.n_cached = self._rows.take(sequence.tokens)
            reader.rng = random.Random(f"draft {sequence.request.seed}")
        pairs = zip(reader.tokens[: reader.n_cached], sequence.tokens[:-1], strict=False)
        reader.n_cached = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        reader.tokens = list(sequence.tokens)
        return reader

    def _guess_once(self, readers: Sequence[Running], probs: dict[int, list[Tensor]]) -> None:
        """Append one guess to each reader's tokens and its distribution to ``probs``."""
        works = [Work(reader, reader.tokens[reader.n_cached :], reader.n_left, True) for reader in readers]
        results = run_pass(self.model, self._rows, works)
        readers = [result.work.running for result in results]
        logits = torch.cat([result.logits[-1:] for result in results])
        rows = next_token_probs(logits, [reader.request.sampling for reader in readers])
        tokens = draw(rows, [reader.rng.random() for reader in readers]).tolist()
        for reader, token, row in zip(readers, tokens, rows, strict=True):
            reader.n_cached = len(reader.tokens)
            reader.tokens.append(token)
            probs[reader.id].append(row)


def verify(logits: Float[Tensor, "k+1 V"], guesses: Guesses, sampling: SamplingConfig, rng: random.Random) -> list[int]:
    """Return new tokens, at least one, distributed as if each were drawn from the model (arXiv 2211.17192, alg. 1).

    Guess x, drawn from q, is accepted with probability min(1, p(x) / q(x)). The first that is not is replaced by a
    draw from max(0, p - q), rescaled; after k accepted ones, one more token is drawn from p.

    Args:
        logits: of the model, at the last known token and at each guess.
        guesses: k of them, with q.
        sampling: turns logits into p; q was made with the same settings.
        rng: the request's random numbers.
    """
    assert guesses.probs is not None
    p, q = next_token_probs(logits, [sampling] * len(logits)), guesses.probs
    for index, token in enumerate(guesses.tokens):
        if rng.random() * float(q[index, token]) >= float(p[index, token]):
            rest = (p[index] - q[index]).clamp(min=0)
            return [*guesses.tokens[:index], int(draw(rest[None], [rng.random()]))]
    return [*guesses.tokens, int(draw(p[-1:], [rng.random()]))]
