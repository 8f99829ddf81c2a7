"""Lines that fit the terminal: ``COLUMNS`` counts, else the terminal's width, else 80."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

_LEAST = 40


def terminal_width() -> int:
    """Return the characters of a line: ``COLUMNS``, else the terminal's width, else 80; at least 40."""
    return max(_LEAST, shutil.get_terminal_size((80, 24)).columns)


def typed(word: object) -> str:
    """Return a word of a command line; a path that begins with a dash gets ./ so that it is no option."""
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)


def wrap(text: str, indent: str = "    ") -> str:
    """Break each line between words where it is wider than the terminal; what follows a break is indented.

    Words such as paths and commands are never cut, whatever their length.

    Args:
        text: of any number of lines; spaces at the start of a line stay, and are kept by what follows it.
        indent: more of it in front of what was broken.
    """
    width = terminal_width()
    return "\n".join(_wrapped(line, width, indent) for line in text.split("\n"))


def _wrapped(line: str, width: int, indent: str) -> str:
    if len(line) <= width:
        return line
    before = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line,
        width,
        subsequent_indent=before + indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
