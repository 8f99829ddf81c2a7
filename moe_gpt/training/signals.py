"""A signal is a request to stop: training finishes its step, saves and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

StopSignalName = Literal["SIGINT", "SIGTERM", "SIGHUP"]


@dataclass
class StopRequest:
    """Whether a signal has asked training to stop."""

    name: StopSignalName | None = None
    """The first signal that arrived; None before that."""


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request to stop; a second SIGINT interrupts at once.

    Python allows signal handlers in the main thread only. In another thread, signals keep their usual effect.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: Any) -> None:
        if stop.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = names[number]
        with contextlib.suppress(OSError):  # the terminal may be gone; print may be interrupted
            os.write(2, b"\nfinishing this step and saving; interrupt again to stop at once\n")

    names: dict[int, StopSignalName] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM"}
    if hasattr(signal, "SIGHUP"):  # a terminal was closed
        names[signal.SIGHUP] = "SIGHUP"
    previous = {number: signal.signal(number, request) for number in names}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
