"""Load and faults: random clients against a server for some minutes, each answer compared with its answer alone.

    python tests/serving/load.py [--minutes 20] [--seed 0]

Up to 64 clients at once join, read whole answers or streams, hang up in the middle, or send rubbish; now and then the
model fails in a pass. Every answer that a client reads to its end must be the text that its request gets alone in an
engine of one row. Memory must stay flat, and in the end nothing may run or wait. Exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import logging
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from serving.served import make_model, make_service, serve

from moe_gpt.inference.engine import Engine
from moe_gpt.inference.text import TextStream
from moe_gpt.serving.jobs import Service, completion_job

CLIENTS = 64
RUBBISH = [b"", b"{", b"\xff", b'{"model": "small"}', b'{"model": "small", "prompt": 5}', b"[" * 5000]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog.",
    "def",
    "f(x):",
    "return",
    "x",
    "+",
    "1",
]
BODIES_A_MINUTE = 100
"""Requests that clients choose from: each is computed alone once, however many answers it got."""


class Load:
    """The clients, and what they saw."""

    def __init__(self, service: Service, url: str, seed: int, n_bodies: int) -> None:
        self.service, self.url, self.rng = service, url, random.Random(seed)
        self.seen: collections.Counter[str] = collections.Counter()
        self.answers: list[tuple[dict[str, Any], str]] = []
        self.wrong: list[str] = []
        self._bodies = [self._make_body() for _ in range(n_bodies)]

    def body(self) -> dict[str, Any]:
        """Return one of the requests."""
        return self.rng.choice(self._bodies)

    def _make_body(self) -> dict[str, Any]:
        """Return a random request. Many prompts begin alike, so that keys are reused."""
        prompt = " ".join(WORDS[: self.rng.randrange(3, len(WORDS))] * self.rng.randrange(1, 4))
        settings = {"temperature": self.rng.choice([0, 0.8, 1.3]), "top_p": self.rng.choice([0.9, 1])}
        limits = {"max_tokens": self.rng.randrange(1, 60), "seed": self.rng.randrange(1000)}
        return {"model": "small", "prompt": prompt[:300], "stop": ["zq"]} | settings | limits

    async def client(self, http: httpx.AsyncClient, until: float) -> None:
        """Ask again and again in one of four ways."""
        while time.monotonic() < until:
            act = self.rng.choices([self.whole, self.stream, self.leave, self.rubbish], [4, 4, 2, 1])[0]
            await act(http)
            await asyncio.sleep(self.rng.random() * 0.2)

    async def whole(self, http: httpx.AsyncClient) -> None:
        """Read an answer at once."""
        body = self.body()
        answer = await http.post("/v1/completions", json=body)
        self.seen[f"whole {answer.status_code}"] += 1
        if answer.status_code == 200:
            self.answers.append((body, answer.json()["choices"][0]["text"]))
        elif answer.status_code not in (429, 500):
            self.wrong.append(answer.text)

    async def stream(self, http: httpx.AsyncClient) -> None:
        """Read an answer in pieces."""
        body, text, finish = self.body(), "", None
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            self.seen[f"stream {answer.status_code}"] += 1
            if answer.status_code not in (200, 429):
                self.wrong.append(f"a stream got {answer.status_code}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    part = json.loads(line[6:])
                    finish = "error" if "error" in part else finish
                    for choice in part.get("choices", ()):
                        text, finish = text + choice["text"], choice["finish_reason"]
        self.seen[f"stream ended by {finish}"] += 1
        if finish in ("stop", "length"):
            self.answers.append((body, text))
        elif answer.status_code == 200 and finish is None:
            self.wrong.append("a stream ended without a reason")

    async def leave(self, http: httpx.AsyncClient) -> None:
        """Hang up in the middle."""
        body = self.body() | {"max_tokens": 100, "stream": self.rng.random() < 0.5}
        try:
            await asyncio.wait_for(http.post("/v1/completions", json=body), self.rng.random() * 0.1)
            self.seen["left too late"] += 1
        except TimeoutError:
            self.seen["left"] += 1

    async def rubbish(self, http: httpx.AsyncClient) -> None:
        """Send what is no request."""
        answer = await http.post("/v1/completions", content=self.rng.choice(RUBBISH))
        self.seen[f"rubbish {answer.status_code}"] += 1
        if answer.status_code != 400:
            self.wrong.append(f"rubbish got {answer.status_code}")

    async def fail_now_and_then(self, until: float) -> None:
        """Let a pass of the model fail every few seconds."""
        while time.monotonic() < until:
            await asyncio.sleep(3 + 4 * self.rng.random())
            norm = self.service.live.engine.model.final_norm
            failure = norm.register_forward_hook(lambda *_: 1 / 0)
            await asyncio.sleep(0.002)
            failure.remove()
            self.seen["failures"] += 1

    async def run(self, seconds: float) -> None:
        """Let all clients ask, noting the memory after a quarter of the time and at the end."""
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits) as http:
            clients = [asyncio.create_task(self.client(http, until)) for _ in range(CLIENTS)]
            failing = asyncio.create_task(self.fail_now_and_then(until))
            await asyncio.sleep(seconds / 4)
            self.early = psutil.Process().memory_info().rss
            await asyncio.gather(*clients, failing)
        self.late = psutil.Process().memory_info().rss


def compare(load: Load) -> None:
    """Compare answers with those of an engine of one row that serves nobody else."""
    model = make_model(load.service.tokenizer.vocab_size)
    known: dict[str, str] = {}
    for body, text in load.answers:
        key = json.dumps(body, sort_keys=True)
        if key not in known:
            engine = Engine(model, n_rows=1)
            job = completion_job(load.service, json.dumps(body).encode())
            assert isinstance(job.requests[0].text, TextStream)
            engine.add(job.requests[0])
            known[key] = "".join(event.text for event in engine.run())
        if known[key] != text:
            load.wrong.append(f"{body}\n  got   {text!r}\n  alone {known[key]!r}")


def main() -> int:
    """Run the load; print what was seen and what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("moe_gpt.inference.engine", "asyncio"):  # of passes that are made to fail, and clients that hang up
        logging.getLogger(name).setLevel(logging.CRITICAL)
    service = make_service({"n_rows": 16, "max_waiting": 40})
    with serve(service) as url:
        load = Load(service, url, options.seed, 200 + round(BODIES_A_MINUTE * options.minutes))
        asyncio.run(load.run(60 * options.minutes))
        deadline = time.monotonic() + 1
        while not service.live.engine.is_idle and time.monotonic() < deadline:
            time.sleep(0.01)
        if not service.live.engine.is_idle:
            load.wrong.append("requests of clients that have gone still run")
    compare(load)
    n_failed = load.seen["whole 500"] + load.seen["stream ended by error"]
    if n_failed > 16 * load.seen["failures"]:  # each ends the requests of a pass or two, at most 16 of each
        load.wrong.append(f"{n_failed} requests failed by {load.seen['failures']} passes that were made to fail")
    if len(load.answers) < 60 * options.minutes:
        load.wrong.append(f"only {len(load.answers)} answers were read to their end")
    if load.late > 1.1 * load.early + 30e6:
        load.wrong.append(f"memory grew from {load.early / 1e6:.0f} to {load.late / 1e6:.0f} MB")
    print(dict(load.seen), f"{len(load.answers)} whole answers", f"{load.early / 1e6:.0f} -> {load.late / 1e6:.0f} MB")
    print("\n".join(load.wrong[:10]) or "nothing wrong")
    return bool(load.wrong)


if __name__ == "__main__":
    sys.exit(main())
