"""``moe-gpt report``: write a page about a run, or about several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_gpt.commands.options import Switch
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

_SECONDS_BETWEEN_PAGES = 20


def report(*runs: Path, out: Path | None = None, watch: Switch = False) -> None:
    """Write a page about a run, or about several runs side by side.

    The page is one file that opens offline. Its pictures are also written as SVG and PNG, into a folder beside the page
    whose name ends in -pictures. A page about several runs compares their summaries; a page about one run shows
    everything about it.

    Args:
        runs: Run folders, finished or not.
        out: The file to write; RUN/report.html by default, or report.html in this folder for several runs.
        watch: Write the page again every 20 seconds while a run trains; the page renews itself in the browser.
    """
    if not runs:
        raise InputError("RUNS is missing; give run folders such as runs/tiny")

    from moe_gpt.report.recorded import tell_apart
    from moe_gpt.report.report import write_report
    from moe_gpt.report.run_records import read_run
    from moe_gpt.report.watch import watch_report

    path = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    check_paths(runs, path)
    if watch:
        watch_report(runs, path, _SECONDS_BETWEEN_PAGES, print)
        return
    found = [read_run(run) for run in runs]
    write_report(found, path)
    for run in tell_apart(found):
        for note in run.notes:
            print(wrap(f"{run.name}: {note}"))
    print(f"wrote {path}")


def check_paths(runs: Sequence[Path], path: Path) -> None:
    """Refuse a page that is no HTML file, and a run that is given twice.

    Raises:
        InputError: which names the path.
    """
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out must be a file that ends in .html, got {path}")
    folders = [run.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise InputError(f"{run} is given more than once; give each run once, or it would count as several seeds")
