"""Write a page about a run, or about several side by side: python scripts/report.py runs/tiny."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_gpt.commands.cli import ArgumentParser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="The page is one file that opens offline; its pictures are also written beside it, as SVG and PNG, into "
        "a folder with the same name and -pictures. Several runs are compared, each with its summary; for all about "
        "one of them give it alone.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder, finished or not")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="default: RUN/report.html; of several runs report.html here"
    )
    return parser.parse_args()


def main() -> None:
    """Read the runs and write the page."""
    arguments = parse_arguments()

    from moe_gpt.report.report import write_report
    from moe_gpt.report.run_records import read_run

    path = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
    check_paths(arguments.runs, path)
    runs = [read_run(run) for run in arguments.runs]
    write_report(runs, path)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"wrote {path}")


def check_paths(runs: Sequence[Path], path: Path) -> None:
    """Refuse a page that is no HTML file, and a run that is given twice.

    Raises:
        InputError: which names the path.
    """
    from moe_gpt.errors import InputError

    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out must be a file that ends in .html, got {path}")
    folders = [run.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise InputError(f"{run} is given more than once: its seed would count as several")
