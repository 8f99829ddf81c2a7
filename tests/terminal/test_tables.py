"""Tables for the terminal."""

from __future__ import annotations

from moe_gpt.terminal.tables import format_table


def test_table_by_hand():
    """The first column to the left, the others to the right; markup and width are left alone; no trailing spaces."""
    table = format_table(("source", "tokens", ""), [("prose", "1,000", ""), ("[bold]", "7", "note")])
    assert table.splitlines() == [
        "source  tokens",
        "prose    1,000",
        "[bold]       7  note",
    ]
    long = "x" * 500
    assert format_table(("a",), [(long,)]).splitlines() == ["a", long]
