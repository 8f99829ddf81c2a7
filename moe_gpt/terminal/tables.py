"""Tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return rows of text under their headings: the first ``left`` columns to the left, the others to the right.

    Nothing is cut or broken, whatever the width of the terminal; lines have no spaces at their ends.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index >= left else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=10_000, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
