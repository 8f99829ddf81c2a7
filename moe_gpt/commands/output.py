"""Output whose reader is gone, whose disk is full or whose terminal hung up."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingStream:
    """A stream that outlives its file: text that cannot be written is dropped, after one warning.

    Args:
        stream: stdout or stderr.
        name: for the warning.
        warn_on: where the warning goes, None for nowhere.
    """

    def __init__(self, stream: TextIO, name: str, warn_on: Any = None) -> None:
        self._stream, self._name, self._warn_on = stream, name, warn_on

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop the rest."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        discard(self._stream)
        if self._warn_on is not None:
            print(
                f"warning: {self._name} is lost ({error}); training continues without it",
                file=self._warn_on,
                flush=True,
            )
            self._warn_on = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: TextIO) -> None:
    """Send the rest of a stream to the null device, because Python flushes the stream once more when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def replace_closed_streams() -> None:
    """Replace a stdout and stderr that were closed before this process began: writing to the one is an error."""
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115 (until the exit)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Keep errors of stdout and stderr from ending the code inside."""
    out, errors = sys.stdout, sys.stderr
    sys.stderr = LastingStream(errors, "stderr")  # type: ignore[assignment]
    sys.stdout = LastingStream(out, "stdout", sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, errors
