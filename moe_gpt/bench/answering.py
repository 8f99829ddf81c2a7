"""Ways to answer many requests with one model: the engine, and what users would otherwise take."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_gpt.bench.generate import in_transformers
from moe_gpt.data.prepare import prepare_data
from moe_gpt.data.stream import Tokens
from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.generate import generate
from moe_gpt.inference.request import Request
from moe_gpt.inference.running import Running
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.inference.speculation import Draft, FitsAll, Guesses
from moe_gpt.model.cache import KVCache
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops import mkl
from moe_gpt.ops.device import tune_process
from moe_gpt.training.saving.saved_model import LoadedRun, load_model

BATCH = 32
"""Sequences of a fixed batch, and of transformers' continuous batching."""
LONGEST = 127
"""Tokens of a prompt at most; the fewest are 8."""
Answers = list[list[int]]


class Subject(NamedTuple):
    """What is measured, and how often."""

    path: str
    run: LoadedRun
    texts: Sequence[Tokens]
    """Held-out tokens of each source."""
    draft: MoEGPT | None
    """Guesses tokens, where there is one."""
    rounds: int

    @property
    def context(self) -> int:
        """Positions of the model."""
        return self.run.model.config.max_seq_len

    def requests(self, n: int, new: tuple[int, int], temperature: float = 0.0, seed: int = 0) -> list[Request]:
        """Return n requests for so many new tokens at least and at most; prompts are cut from the texts at random."""
        rng = random.Random(seed)
        return [self._request(rng, new, SamplingConfig(temperature=temperature)) for _ in range(n)]

    def answered(self, requests: Sequence[Request], **options: Any) -> Answered:
        """Let an engine of these options answer all requests."""
        return measured(partial(by_engine, self.run.model, requests, **options))

    def answered_one_by_one(self, requests: Sequence[Request]) -> Answered:
        """Answer each request with ``generate``."""
        return measured(partial(one_by_one, self.run.model, requests))

    def _request(self, rng: random.Random, new: tuple[int, int], sampling: SamplingConfig) -> Request:
        longest = min(LONGEST, self.context // 2)
        text, length = rng.choice(self.texts), rng.randint(8, longest)
        start, limit = rng.randrange(len(text) - length), min(rng.randint(*new), self.context - longest)
        prompt = text[start : start + length].tolist()
        return Request(prompt=prompt, max_new_tokens=limit, sampling=sampling, seed=rng.getrandbits(31))


def held_out(run: LoadedRun, say: Callable[[str], None]) -> list[Tokens]:
    """Return the held-out tokens of each source; raise ``InputError`` where they are too few to cut prompts from."""
    data = prepare_data(run.config.data, run.tokenizer, say=say)
    texts: list[Tokens] = [source.validation.tokens for source in data.sources]
    if (fewest := min(map(len, texts))) <= LONGEST:
        least = f"each source must hold out more than {LONGEST} tokens, to cut prompts from (data.validation_fraction)"
        raise InputError(f"{run.path}: {least}, got {fewest}")
    return texts


class Answered(NamedTuple):
    """The seconds that all answers took, and their tokens."""

    seconds: float
    tokens: Answers

    @property
    def n_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.tokens))

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.n_tokens / self.seconds

    def share_equal(self, others: Answers) -> float:
        """Return the share of answers that are the same as others."""
        return statistics.fmean(map(list.__eq__, self.tokens, others))


class Counted(FitsAll):
    """A draft whose passes and guesses are counted."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.n_passes, self.n_guesses = draft, 0, 0

    def propose(self, sequences: Sequence[Running]) -> list[Guesses]:
        """Return the draft's guesses."""
        guesses = self.draft.propose(sequences)
        self.n_passes += len(sequences)
        self.n_guesses += sum(len(each.tokens) for each in guesses)
        return guesses


def measured(answer: Callable[[], Answers]) -> Answered:
    """Answer, and measure the time."""
    started = time.perf_counter()
    tokens = answer()
    return Answered(time.perf_counter() - started, tokens)


def _by_mkl(answer: Callable[[], Answers]) -> Answers:
    with mkl.products:
        return answer()


def by_engine(model: MoEGPT, requests: Sequence[Request], **options: Any) -> Answers:
    """Answer all requests with an engine of these options."""
    engine = Engine(model, max_waiting=len(requests), **options)
    answers: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    for event in engine.run():
        if event.token is not None:
            answers[event.request_id].append(event.token)
    return list(answers.values())


def one_by_one(model: MoEGPT, requests: Sequence[Request]) -> Answers:
    """Answer each request with ``generate``."""
    return [list(generate(model, r.prompt, r.max_new_tokens, r.sampling, r.seed)) for r in requests]


def in_fixed_batches(requests: Sequence[Request], decode: Callable[[Tensor, Tensor, int], Tensor]) -> Answers:
    """Answer greedy requests in batches that begin and end together, sorted by the length of the prompts.

    ``decode`` gets tokens (B, T), padded on the left, where they are tokens (B, T), and the number n of new tokens that
    the longest answer needs; it returns the new tokens (B, n).
    """
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        prompts, limits = zip(*((requests[i].prompt, requests[i].max_new_tokens) for i in places), strict=True)
        missing = [len(prompts[-1]) - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[0] * n + list(prompt) for n, prompt in zip(missing, prompts, strict=True)])
        is_token = torch.arange(tokens.shape[1]) >= torch.tensor(missing)[:, None]
        rows = decode(tokens, is_token, max(limits)).tolist()
        answers |= {place: row[:n] for place, row, n in zip(places, rows, limits, strict=True)}
    return [answers[place] for place in range(len(requests))]


@torch.inference_mode()
def _our_decode(model: MoEGPT, tokens: Tensor, is_token: Tensor, n_new: int) -> Tensor:
    (B, T), new = tokens.shape, []
    cache = KVCache(model.config, B, T + n_new, tokens.device, model.embedding.weight.dtype)
    valid = torch.cat([is_token, torch.ones(B, n_new, dtype=torch.bool)], 1)
    for end in range(T, T + n_new):
        hidden, _ = model.hidden_states(tokens, valid[:, :end], cache)
        tokens = model.output(hidden[:, -1]).argmax(-1, keepdim=True)
        new.append(tokens)
    return torch.cat(new, 1)


def _their_decode(model: Any, tokens: Tensor, is_token: Tensor, n_new: int) -> Tensor:
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(tokens, attention_mask=is_token.long(), max_new_tokens=n_new, **settings)[
        :, tokens.shape[1] :
    ]


def _their_batching(model: Any, requests: Sequence[Request]) -> Answered:
    """Answer by the manager behind ``generate_batch``, which takes a limit for each request; its start is not timed."""
    import transformers

    pages = -(-model.config.max_position_embeddings // 64) * BATCH
    sizes = {"page_size": 64, "num_blocks": pages, "max_batch_tokens": 512, "max_requests_per_batch": BATCH}
    greedy, config = transformers.GenerationConfig(eos_token_id=-1), transformers.ContinuousBatchingConfig(**sizes)
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:
        return measured(partial(_through, manager, requests))


def _through(manager: Any, requests: Sequence[Request]) -> Answers:
    names = [manager.add_request(list(r.prompt), max_new_tokens=r.max_new_tokens) for r in requests]
    found: dict[str, list[int]] = {}
    while len(found) < len(names) and manager.is_running():
        if (result := manager.get_result(timeout=1)) and result.is_finished():
            found[result.request_id] = result.generated_tokens
    return [found[name] for name in names]


FIRST, ONE_BY_ONE = "engine, 32 rows", "generate, one by one"
_OURS: dict[str, Callable[[MoEGPT, Sequence[Request]], Answers]] = {
    FIRST: partial(by_engine, n_rows=32),
    "engine, 32 rows, not exact": partial(by_engine, n_rows=32, is_exact=False),
    "engine, 8 rows": partial(by_engine, n_rows=8),
    "engine, 1 row": partial(by_engine, n_rows=1),
    ONE_BY_ONE: one_by_one,
    "fixed batches of 32": lambda model, asked: in_fixed_batches(asked, partial(_our_decode, model)),
}
THEIR_BATCHES, THEIR_BATCHING = "transformers, batches of 32", "transformers, generate_batch"
NAMES = [*_OURS, THEIR_BATCHES, THEIR_BATCHING]


def make_answerer(run: str, requests: Sequence[Request], name: str) -> Callable[[], Answered]:
    """Return what answers all requests with the model of a run, in the way that one of ``NAMES`` says.

    All but ``generate`` have MKL's products, which are the faster for few rows: the exact engine needs them, and
    transformers has them unless somebody changes PyTorch's precision.
    """
    model = load_model(run).model
    if name in _OURS:
        tune_process(model.embedding.weight.device)
        answer = partial(_OURS[name], model, requests)
        return partial(measured, answer if name == ONE_BY_ONE else partial(_by_mkl, answer))
    theirs = in_transformers(model, "grouped_mm")  # the faster of its implementations
    if name == THEIR_BATCHING:
        return partial(_their_batching, theirs, requests)
    return partial(measured, partial(in_fixed_batches, requests, partial(_their_decode, theirs)))
