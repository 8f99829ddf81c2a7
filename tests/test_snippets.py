"""The snippets of docs/ are the code: each stands in the file that the line before it names, line by line."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = re.compile(r"^`(\S+)`:\n\n```\w+\n(.*?)```", re.DOTALL | re.MULTILINE)
SNIPPETS = [
    (page.name, file, code)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for file, code in SNIPPET.findall(page.read_text(encoding="utf-8"))
]


def stands_in(code: str, source: str) -> bool:
    """Whether the lines of ``code`` follow each other in ``source``, however deep both are indented."""
    wanted = textwrap.dedent(code).splitlines()
    lines = source.splitlines()
    parts = ("\n".join(lines[start : start + len(wanted)]) for start in range(len(lines)))
    return any(textwrap.dedent(part).splitlines() == wanted for part in parts)


@pytest.mark.parametrize(("page", "file", "code"), SNIPPETS, ids=[f"{page}-{file}" for page, file, _ in SNIPPETS])
def test_snippet_stands_in_its_file(page, file, code):
    """So the page cannot drift from the code."""
    assert stands_in(code, (ROOT / file).read_text(encoding="utf-8"))


def test_pages_to_read_first_have_snippets():
    """Both show code, and a changed line would be found."""
    assert {page for page, _, _ in SNIPPETS} >= {"design.md", "all-of-moe_gpt.md"}
    assert stands_in("    a = 1\n    b = 2\n", "def f():\n    a = 1\n    b = 2\n")
    assert not stands_in("a = 1\nb = 3\n", "def f():\n    a = 1\n    b = 2\n")
