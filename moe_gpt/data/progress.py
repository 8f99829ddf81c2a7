"""How far the preparation of a source is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from moe_gpt.config import SourceConfig
from moe_gpt.data.corpus import ReadingProgress

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress(
    source: SourceConfig, reading: ReadingProgress, say: Callable[[str], None]
) -> Iterator[Callable[[int, int], None]]:
    """Give a function to call with the documents and tokens so far; it shows them, and the time left where known.

    Args:
        source: its ``max_tokens`` may end the work before its text does.
        reading: how much of its text has been read.
        say: told a line every ten seconds where stderr is no terminal.
    """
    started_at = line_at = time.monotonic()
    is_terminal = sys.stderr.isatty()
    with tqdm(desc=source.name, unit=" tokens", unit_scale=True, disable=not is_terminal, leave=False) as bar:

        def report(n_documents: int, n_tokens: int) -> None:
            nonlocal line_at
            fraction = max(reading.fraction or 0.0, n_tokens / source.max_tokens if source.max_tokens else 0.0)
            now = time.monotonic()
            if is_terminal:
                bar.total = round(n_tokens / fraction) if fraction else None  # tqdm tells the time left from it
                bar.set_postfix(documents=n_documents, refresh=False)
                bar.update(n_tokens - bar.n)
            elif now - line_at >= _SECONDS_BETWEEN_LINES:
                line_at = now
                left = round((now - started_at) * (1 / fraction - 1)) if fraction else None
                estimate = f", about {datetime.timedelta(seconds=left)} left" if left is not None else ""
                say(f"tokenising {source.name}: {n_documents:,} documents, {n_tokens:,} tokens{estimate}")

        yield report
