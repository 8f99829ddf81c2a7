"""A report that is written anew while its runs train."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_gpt.report.report import write_report
from moe_gpt.report.run_records import is_training, read_run

_WRITTEN_WHILE_TRAINING = ("config.yaml", "*.jsonl", "evaluations/*.safetensors")


def watch_report(run_dirs: Sequence[Path], path: Path, every_seconds: int, say: Callable[[str], None]) -> None:
    """Write the page of runs, and again whenever they have recorded something, until none of them trains any more.

    Until then browsers load the page anew by themselves. Ctrl-C ends the watching; the last page stays in any case.

    Args:
        run_dirs: folders of runs.
        path: of the HTML file.
        every_seconds: how often to look; at least 1.
        say: is told of every page.

    Raises:
        InputError: where a folder holds no run.
        OSError: where the page cannot be written.
    """
    written: set[tuple[Path, int, int]] = set()
    with contextlib.suppress(KeyboardInterrupt):
        while any(map(is_training, run_dirs)):
            found = set(_versions(run_dirs))
            if found != written:
                write_report([read_run(run_dir) for run_dir in run_dirs], path, every_seconds)
                say(f"wrote {path} at {time.strftime('%H:%M:%S')}; it is renewed while a run trains")
                written = found
            time.sleep(every_seconds)
    write_report([read_run(run_dir) for run_dir in run_dirs], path)
    say(f"wrote {path}")


def _versions(run_dirs: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    """Yield what is another whenever a run has recorded something: its files with their times and sizes."""
    for run_dir in run_dirs:
        for pattern in _WRITTEN_WHILE_TRAINING:
            for file in run_dir.glob(pattern):
                status = file.stat()
                yield file, status.st_mtime_ns, status.st_size
