"""The server as a process: it listens, ends at signals, and writes a log that names nobody's words."""

from __future__ import annotations

import logging
import re
import signal
import socket
import sys
from typing import Any

import uvicorn

from moe_gpt.errors import InputError
from moe_gpt.serving.jobs import Service
from moe_gpt.serving.server import make_app


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: where the address is taken or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error}") from None


LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def check_key(key: str | None, host: str) -> None:
    """Refuse a key that no header can carry; warn where everybody may come in.

    Raises:
        InputError: where the key is empty or has other characters than ASCII's letters, digits and signs.
    """
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise InputError(f"--api-key must be letters, digits and signs of ASCII without spaces, got {key!r}")
    if key is None and host not in LOOPBACK:
        print(f"WARNING: everybody who reaches {host} is served; --api-key asks for a key", file=sys.stderr)


class _Server(uvicorn.Server):
    """Finishes what runs at the first signal, refusing what comes, and ends at once at the second."""

    service: Service

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.service.is_stopping:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it shows where each answer was broken off
            self.force_exit = True
        else:
            n_running, again = self.service.live.engine.n_running, signal.Signals(sig).name
            print(f"finishing {n_running} answers; a second {again} ends at once", file=sys.stderr, flush=True)
        self.service.is_stopping = True
        super().handle_exit(sig, frame)


def run(service: Service, listener: socket.socket, stop_seconds: int) -> None:
    """Serve until a signal.

    Args:
        service: what to serve.
        listener: from ``listen``.
        stop_seconds: what running answers get after the first signal.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that hung up
    server = _Server(
        uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=stop_seconds,
        )
    )
    server.service = service
    try:
        server.run([listener])
    finally:
        service.live.stop()  # also where a second signal left it running
