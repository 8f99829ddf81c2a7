"""The engine in a thread of its own, and what is known of it from outside."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from moe_gpt.inference.engine import Engine
from moe_gpt.inference.request import Event, Request

_log = logging.getLogger(__name__)
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Live:
    """Runs an engine in a thread, and hands each request's events to the event loop that asked for them.

    Args:
        engine: only this object may use it from now on.
        n_threads: of matrix products; the engine's law holds for one.
    """

    def __init__(self, engine: Engine, n_threads: int = 1) -> None:
        self.engine, self.failure = engine, ""
        self._n_threads = n_threads
        self._queues: dict[int, asyncio.Queue[tuple[Event, float]]] = {}
        self._wake, self._is_stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self.metrics = Metrics(engine)

    def start(self) -> None:
        """Begin to serve; call it in the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its pass."""
        self._is_stopped = True
        self._wake.set()
        if self._thread.is_alive():  # it was started, and has not ended already
            self._thread.join(timeout=30)

    def answer(self, requests: Sequence[Request]) -> Answer:
        """Queue requests; return their events as they come. Whoever asks must close the answer.

        Raises:
            InputError: where a request cannot be served; then none of them is.
            Overloaded: where too many wait; then none of them is served.
        """
        answer = Answer(self)
        try:
            for index, request in enumerate(requests):
                request_id = self.engine.add(request)
                answer.index_of[request_id], self._queues[request_id] = index, answer.queue
        except Exception:
            answer.close()
            raise
        self._wake.set()
        return answer

    def forget(self, request_id: int) -> None:
        """Forget who asked for a request."""
        self._queues.pop(request_id, None)

    def _serve(self) -> None:
        torch.set_num_threads(self._n_threads)
        try:
            while not self._is_stopped:
                if self.engine.is_idle:
                    self._wake.wait()
                    self._wake.clear()
                if events := self.engine.step():
                    self._loop.call_soon_threadsafe(self._deliver, events, time.monotonic())
        except Exception as error:
            _log.exception("the engine failed")
            self.failure = str(error) or repr(error)
            self._loop.call_soon_threadsafe(self._fail)

    def _deliver(self, events: Sequence[Event], moment: float) -> None:
        for event in events:
            if (queue := self._queues.get(event.request_id)) is not None:
                queue.put_nowait((event, moment))

    def _fail(self) -> None:
        ends = [Event(request_id, finish="error", error=self.failure) for request_id in self._queues]
        self._deliver(ends, time.monotonic())


class Answer:
    """Yields (index of the request, event) as they come, until all requests have ended.

    It is no generator, because closing one that has not begun does nothing: a client may leave before that.
    """

    def __init__(self, live: Live) -> None:
        self._live, self._began = live, time.monotonic()
        self._seen: dict[int, float] = {}  # when the latest token of each request came
        self.queue: asyncio.Queue[tuple[Event, float]] = asyncio.Queue()
        self.index_of: dict[int, int] = {}
        """Requests that have not ended, by number."""

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self.index_of:
            raise StopAsyncIteration
        event, moment = await self.queue.get()
        index = self.index_of[event.request_id]
        if event.token is not None:
            before = self._seen.get(index)
            self._live.metrics.count_token(moment - (before or self._began), is_first=before is None)
            self._seen[index] = moment
        if event.finish:
            self._live.forget(event.request_id)
            del self.index_of[event.request_id]
        return index, event

    def close(self) -> None:
        """Cancel what has not ended."""
        while self.index_of:
            request_id, _ = self.index_of.popitem()
            self._live.forget(request_id)
            self._live.engine.cancel(request_id)


class Metrics:
    """Numbers for Prometheus, in a registry of their own, so that several servers fit into one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        gauges = {
            "requests_running": ("Requests that have a row of the cache.", lambda: engine.n_running),
            "requests_waiting": ("Requests that wait for a row.", lambda: engine.n_waiting),
            "experts_touched": (
                "Experts of a layer that the last pass read, in the mean.",
                engine.load.touched,
            ),
        }
        for name, (sentence, read) in gauges.items():
            Gauge(f"moe_gpt_{name}", sentence, registry=self.registry).set_function(read)
        self.n_tokens = 0
        self._tokens = Counter("moe_gpt_tokens_generated", "Tokens generated.", registry=self.registry)
        names = {"time_to_first_token": "until the first token", "time_between_tokens": "between tokens"}
        self._first, self._between = (
            Histogram(f"moe_gpt_{name}_seconds", f"Seconds {text}.", registry=self.registry, buckets=_SECONDS)
            for name, text in names.items()
        )

    def count_token(self, seconds: float, is_first: bool) -> None:
        """Count a token that came some seconds after the request or after the token before it."""
        self.n_tokens += 1
        self._tokens.inc()
        (self._first if is_first else self._between).observe(seconds)
