"""Clients that read the server's streams from raw sockets: other clients take more time than the server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.errors import InputError

_SECONDS_TO_START = 120


class Streamed(NamedTuple):
    """An answer."""

    text: str
    n_tokens: int
    moments: list[float]
    """When the client began to connect, and when each piece of text came."""

    @property
    def gaps(self) -> list[float]:
        """Seconds to the first piece of text, and between pieces."""
        return [later - earlier for earlier, later in itertools.pairwise(self.moments)]


@contextlib.contextmanager
def served(run: str) -> Iterator[int]:
    """Serve a run under the name "run" in a process of its own; yield the port.

    Raises:
        InputError: with the last words of a server that does not start.
    """
    command = [sys.executable, "-m", "moe_gpt", "serve", run, "--name", "run", "--port", "0"]
    with tempfile.NamedTemporaryFile() as said, subprocess.Popen(command, stderr=said) as process:
        try:
            yield _announced_port(process, Path(said.name))
        finally:
            process.terminate()


def _announced_port(process: subprocess.Popen, said: Path) -> int:
    deadline = time.monotonic() + _SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"^serving run at http://127.0.0.1:(\d+)\b", said.read_text(), re.MULTILINE):
            return int(found[1])
        time.sleep(0.05)
    raise InputError(f"the server does not start: {said.read_text().strip()[-500:]}")


def ask_all(port: int, bodies: Sequence[dict[str, Any]], n_clients: int) -> tuple[float, list[Streamed]]:
    """Let clients ask at once, each its next question after an answer; return the seconds, and the answers in order.

    Args:
        port: of the server on this machine.
        bodies: of ``POST /v1/completions``.
        n_clients: connections at a time.
    """
    answers: dict[int, Streamed] = {}
    questions = enumerate(bodies)

    async def ask_in_turn() -> None:
        for index, body in questions:
            answers[index] = await _ask(port, body)

    async def ask_at_once() -> None:
        await asyncio.gather(*(ask_in_turn() for _ in range(n_clients)))

    started = time.perf_counter()
    asyncio.run(ask_at_once())
    return time.perf_counter() - started, [answers[index] for index in range(len(bodies))]


async def _ask(port: int, body: dict[str, Any]) -> Streamed:
    moments, text, n_tokens = [time.perf_counter()], "", 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\n\r\n".encode() + data)
    async for line in reader:
        if line.startswith((b'data: {"error"', b'{"error"')):
            raise InputError(f"the server must answer, got {line.decode()}")
        if line.startswith(b"data: {"):
            part = json.loads(line.removeprefix(b"data: "))
            n_tokens = (part["usage"] or {}).get("completion_tokens", n_tokens)
            if piece := "".join(choice["text"] for choice in part["choices"]):
                moments.append(time.perf_counter())
                text += piece
    writer.close()
    return Streamed(text, n_tokens, moments)
