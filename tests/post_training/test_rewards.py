"""Rules judge a line of Python without running it."""

from __future__ import annotations

import pytest

from moe_gpt.post_training.rewards import parses, several_names, uses_argument

PROMPT = "def area(width, *, height=2, **rest):\n    return"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" width * height\n", (1, 1, 1)),
        (" width\n", (1, 1, 0)),
        (" rest\n", (1, 1, 0)),
        (" self.width\n", (1, 0, 1)),
        (" value\n    more that is not judged", (1, 0, 0)),
        (" 3\n", (1, 0, 0)),
        (" [width for width in '\\d']\n", (1, 1, 0)),
        (" width * height", (0, 0, 0)),
        (" width *\n", (0, 0, 0)),
        ("\n", (0, 0, 0)),
        (" # width, height\n", (0, 0, 0)),
        ("ed = width\n", (0, 0, 0)),
        (" width; height\n", (0, 0, 0)),
        (" wid\0th\n", (0, 0, 0)),
        (f" {'(' * 5000}width{')' * 5000}\n", (0, 0, 0)),
        (f" {'-' * 50_000}width\n", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_lines_are_judged(answer, expected):
    """Whether they parse, use an argument, and have several names; a line that does not end is nothing."""
    assert tuple(rule(PROMPT, answer) for rule in (parses, uses_argument, several_names)) == expected


def test_nothing_is_run(tmp_path):
    """Not even a valid line that would leave a file."""
    line = f" open({str(tmp_path / 'trace')!r}, 'w')\n"
    assert parses(PROMPT, line) == 1
    assert not list(tmp_path.iterdir())
