"""Continuous batching: many requests share each pass of the model, and join and leave between passes.

Orca (Yu et al., OSDI 2022) schedules by iteration in this way; prompts are cut into chunks that share a pass with
decoding (Sarathi, arXiv 2308.16369).

The law: what a request gets does not depend on who shares its passes, how its prompt was cut, or when it came. On a
CPU in float32, with one thread, this holds bit for bit. Elsewhere products of other shapes round differently, and a
close decision can fall the other way.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from moe_gpt import ops
from moe_gpt.config.section import Count, CountOrZero, require
from moe_gpt.errors import InputError, shown
from moe_gpt.inference.answers import choose_tokens, score_prompt, tell
from moe_gpt.inference.load import ExpertLoad
from moe_gpt.inference.passes import Result, Work, run_pass
from moe_gpt.inference.request import Event, Request
from moe_gpt.inference.rows import FEWEST_REUSED, RowCache
from moe_gpt.inference.running import Running
from moe_gpt.inference.sampling import DAMAGED
from moe_gpt.inference.speculation import NOTHING, Draft, Guesses, NoDraft
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import Precision, autocast

_log = logging.getLogger(__name__)


LONGER = "load the model with more: --max-seq-len, max_seq_len= of moe_gpt.load"


def checked_context(model: MoEGPT, context: int | None) -> int:
    """Return the positions to use, by default the model's ``max_seq_len``; raise ``InputError`` for more than that."""
    limit, most = context or model.config.max_seq_len, model.config.max_seq_len
    if not 0 < limit <= most:
        raise InputError(f"the context must be from 1 to the model's {most} tokens, got {limit}; or {LONGER}")
    return limit


class Overloaded(Exception):
    """All rows are taken and ``max_waiting`` requests wait."""


class Engine:
    """Serves requests with one model. ``add`` and ``cancel`` may be called from any thread, ``step`` from one.

    Args:
        model: put into evaluation mode.
        n_rows: sequences that run at once. Their cache is allocated here and never grows.
        context: positions of prompt and answer together; by default the model's ``max_seq_len``.
        chunk: tokens of a prompt in one pass at most.
        tokens_per_step: tokens in one pass at most, as far as decoding alone does not need more.
        max_waiting: requests that may wait for a row.
        reuse_prompts: whether prompts that begin alike share keys and values.
        draft: guesses tokens, which a pass then checks all at once.
        precision: compute type.
        is_exact: False gives up the law on a CPU, to measure what it costs.
    """

    def __init__(
        self,
        model: MoEGPT,
        *,
        n_rows: int = 32,
        context: int | None = None,
        chunk: int = 128,
        tokens_per_step: int = 256,
        max_waiting: int = 256,
        reuse_prompts: bool = True,
        draft: Draft | None = None,
        precision: Precision = "fp32",
        is_exact: bool = True,
    ) -> None:
        if not isinstance(model, MoEGPT):
            raise InputError(f"the engine needs a MoEGPT (the .model of moe_gpt.load), got {type(model).__name__}")
        require(Count, n_rows=n_rows, chunk=chunk, tokens_per_step=tokens_per_step)
        weight = model.embedding.weight
        self.model, self.context = model.eval(), checked_context(model, context)
        self.precision, self.chunk, self.tokens_per_step = precision, chunk, tokens_per_step
        self.n_rows, self.max_waiting, self.reuse_prompts = n_rows, max_waiting, reuse_prompts
        self.draft = draft or NoDraft()
        self.draft.require_fit(model, n_rows)
        dtype = torch.bfloat16 if precision == "bf16" else weight.dtype
        self._is_exact = is_exact and weight.device.type == "cpu" and dtype == torch.float32
        self._rows = RowCache(model.config, n_rows, self.context, weight.device, dtype)
        self._running: dict[int, Running] = {}  # in the order of arrival
        self._lock = threading.Lock()  # of the next three
        self._waiting: deque[Running] = deque()
        self._cancelled: set[int] = set()
        self._ids = itertools.count()
        self.load = ExpertLoad(len(model.moe_layers()), model.config.n_experts)
        """What the experts had to do since the start."""

    @property
    def n_running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of all rows."""
        return self._rows.keys.nbytes + self._rows.values.nbytes

    @property
    def most_requests(self) -> int:
        """Requests that may run or wait at once."""
        return self.n_rows + self.max_waiting

    @property
    def is_idle(self) -> bool:
        """Whether ``step`` has nothing to do."""
        return not (self._running or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request, first come, first served; return its number.

        Raises:
            InputError: where the prompt is empty, has ids that are no tokens, or leaves no room in the context.
            Overloaded: where too many wait.
        """
        self.check(request)
        with self._lock:
            if len(self._running) + len(self._waiting) >= self.most_requests:
                raise Overloaded(f"{self.n_rows} requests run and {self.max_waiting} wait")
            running = Running(next(self._ids), request, self.context)
            self._waiting.append(running)
        return running.id

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, which gives its row to another. One that has ended already is left alone."""
        with self._lock:
            self._cancelled.add(request_id)

    def step(self) -> list[Event]:
        """Run the model once; return what happened to the requests in it.

        A failure of the model ends the requests of this pass and no others: their events have ``finish`` "error".
        """
        if self.model.training:  # somebody trains it in between
            self.model.eval()
        events = self._end_cancelled()
        self._admit()
        ready = [running for running in self._running.values() if running.n_left == 1]
        works = [Work(running, running.tokens[-1:], 1, True) for running in ready] + self._prompt_chunks(len(ready))
        try:
            for event in self._run(ready, works):
                events.append(event)  # one by one, so that none is lost where a later one fails
        except Exception as error:  # whatever a model, a draft or a damaged weight raises
            _log.exception("a pass of the model failed")
            events += self._fail([work.running for work in works], str(error) or repr(error))
        return events

    def _fail(self, sequences: Sequence[Running], error: str) -> list[Event]:
        """End those that have not ended."""
        failed = [running for running in sequences if running.id in self._running]
        return [self._end(running.end("error", error), is_damaged=True) for running in failed]

    def run(self) -> Iterator[Event]:
        """Step until nothing is left to do."""
        while not self.is_idle:
            yield from self.step()

    def check(self, request: Request) -> None:
        """Raise ``InputError`` for a request that ``add`` would refuse, whatever the load."""
        n_prompt = len(request.prompt)
        _check_ids(request.prompt, self.model.embedding.num_embeddings)
        if request.beside:
            request.beside.check(self.model, request.prompt)
        require(CountOrZero, max_new_tokens=request.max_new_tokens, n_logprobs=request.n_logprobs or 0)
        if n_prompt + (request.max_new_tokens > 0) > self.context:
            raise InputError(f"the prompt must be shorter than the context of {self.context} tokens, got {n_prompt}")

    def _end_cancelled(self) -> list[Event]:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            waiting = [running for running in self._waiting if running.id in cancelled]
            for each in waiting:
                self._waiting.remove(each)
        running = [self._running[request_id] for request_id in cancelled & self._running.keys()]
        # whether a prompt's numbers are finite is known only at its end
        return [self._end(each.end("cancelled"), is_damaged=each.is_reading) for each in waiting + running]

    def _admit(self) -> None:
        """Give free rows to those who wait."""
        with self._lock:
            while self._waiting and self._rows.n_free and not self._can_share_soon(self._waiting[0]):
                running = self._waiting.popleft()
                reuse, digest = self._may_share(running), running.request.digest
                running.row, running.n_cached = self._rows.take(running.tokens, reuse, digest)
                self._running[running.id] = running

    def _can_share_soon(self, waiting: Running) -> bool:
        """Whether a running request is reading the same prompt, as other choices of a request do: it is read once."""
        prompt, read = waiting.request.prompt, [each.request for each in self._running.values() if each.is_reading]
        is_read = any(each.prompt == prompt and each.digest == waiting.request.digest for each in read)
        return is_read and len(prompt) > FEWEST_REUSED and self._may_share(waiting)

    def _may_share(self, running: Running) -> bool:
        """Whether keys of the same prompt can be taken: not where its own log-probabilities are wanted."""
        return self.reuse_prompts and not running.request.scores_prompt

    def _prompt_chunks(self, n_decoding: int) -> list[Work]:
        """Return chunks of the prompts, oldest first, for which a pass has room."""
        works, room = [], max(self.tokens_per_step - n_decoding, self.chunk)  # so that nobody waits for ever
        for running in self._running.values():
            if room and running.n_left > 1:
                n_tokens = min(running.n_left, self.chunk, room)
                tokens = running.tokens[running.n_cached : running.n_cached + n_tokens]
                works.append(Work(running, tokens, n_tokens, n_tokens == running.n_left))
                room -= n_tokens
        return works

    @torch.inference_mode()
    def _run(self, ready: Sequence[Running], works: list[Work]) -> Iterator[Event]:
        if not works:
            return
        with autocast(self.model.embedding.weight.device, self.precision), self._law():
            for work in works:
                work.running.keep(self.model)
            guesses = self._guess(ready, works)
            results = run_pass(self.model, self._rows, works)
        self.load.add([layer.indices for layer in results[0].chosen])
        for result in results:
            score_prompt(result)
            result.work.running.n_cached += result.work.n_known
        at_end = [result for result in results if result.work.reaches_end]
        for result, tokens in zip(at_end, choose_tokens(at_end, guesses), strict=True):
            yield from self._advance(result, tokens)

    def _law(self) -> contextlib.AbstractContextManager[None]:
        return ops.as_if_alone() if self._is_exact else contextlib.nullcontext()

    def _guess(self, ready: Sequence[Running], works: list[Work]) -> dict[int, Guesses]:
        """Append guesses to the works of the sequences that decode, which are the first; return them.

        Nothing is guessed before an answer's first token: how much of a prompt is left depends on how it was cut.
        """
        answering = [running for running in ready if len(running.tokens) > len(running.request.prompt)]
        guesses = dict(zip((running.id for running in answering), self.draft.propose(answering), strict=True))
        for index, running in enumerate(ready):
            guessed = guesses.get(running.id, NOTHING).tokens
            works[index] = works[index]._replace(tokens=works[index].tokens + guessed)
        return guesses

    def _advance(self, result: Result, tokens: Sequence[int]) -> list[Event]:
        """Let a sequence accept its new tokens."""
        running = result.work.running
        if not tokens:
            return [self._end(running.end("error", DAMAGED), is_damaged=True)]
        events = list(tell(result, tokens))
        running.n_cached += len(tokens) - 1  # guesses that held have their keys in the row
        self._rows.keep(running.row, running.n_cached)
        if events[-1].finish:
            self._end(events[-1])
        return events

    def _end(self, event: Event, is_damaged: bool = False) -> Event:
        """Take a request's row back, if it has one."""
        if (running := self._running.pop(event.request_id, None)) is not None:
            self._rows.release(running.row, is_damaged)
        return event


def _check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    if not all(isinstance(token, int) for token in prompt):
        raise InputError(f"the prompt must be token ids, got {shown(prompt)}")
    if not prompt:
        raise InputError("the prompt must have at least one token, got none")
    if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
        raise InputError(f"the prompt's ids must be from 0 to {vocab_size - 1}, got {wrong[0]}")
