"""Progress of something long: a bar where stderr is a terminal, otherwise a line now and then."""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from moe_gpt.terminal.numbers import format_count
from moe_gpt.terminal.wrapping import wrap

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Shows how many tokens are done of how many.

    Args:
        description: what is going on.
        total: tokens in all; None where that is not known.
        done: tokens that are done already.
        say: told a line every ten seconds where stderr is no terminal.
    """

    def __init__(
        self, description: str, total: int | None = None, done: int = 0, say: Callable[[str], None] | None = None
    ) -> None:
        self._say, self._pending, self._line_at = say or functools.partial(print, flush=True), "", time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._started_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            _Tokens(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            expand=True,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(description, total=total, completed=done, note="")
        if self._is_terminal:
            self._bar.start()

    def update(self, done: int, note: str, line: str, total: int | None = None) -> None:
        """Show progress.

        Args:
            done: tokens so far.
            note: a few words beside the bar.
            line: the whole line that is printed where there is no bar, if it is time for one.
            total: tokens in all, where that is known better now.
        """
        if self._is_terminal:
            self._bar.update(self._task, completed=done, note=note, total=total)
            return
        self._pending = line
        if time.monotonic() - self._line_at >= _SECONDS_BETWEEN_LINES:
            self.flush()

    def describe(self, description: str, line: str = "") -> None:
        """Say what goes on now: a word beside the bar, or a line of its own where there is no bar."""
        if self._is_terminal:
            self._bar.update(self._task, description=description)
        elif line:
            self._say(line)

    def flush(self) -> None:
        """Print the newest line that has not been printed."""
        if self._pending:
            self._say(self._pending)
            self._pending, self._line_at = "", time.monotonic()

    def time_left(self, fraction: float) -> datetime.timedelta | None:
        """Return the time that the rest takes at the speed so far; None before anything is done."""
        seconds = time.monotonic() - self._started_at
        return datetime.timedelta(seconds=round(seconds * (1 / fraction - 1))) if fraction > 0 else None

    def say(self, text: str) -> None:
        """Print on stdout without tearing the bar."""
        with self._aside(sys.stdout.isatty()):
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr without tearing the bar."""
        self.flush()
        with self._aside(True):
            print(wrap(f"warning: {text}"), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _aside(self, is_same_terminal: bool) -> Iterator[None]:
        """Take the bar away while something else is printed on its terminal."""
        should_return = self._bar.live.is_started and is_same_terminal
        if should_return:
            self._bar.stop()
        try:
            yield
        finally:
            if should_return:
                self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._is_terminal:
            self._bar.stop()


class _Tokens(ProgressColumn):
    """Tokens done, and in all."""

    def render(self, task: Task) -> Text:
        of = f"/{format_count(task.total)}" if task.total else ""
        return Text(f"{format_count(task.completed)}{of}")
