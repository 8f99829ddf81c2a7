"""What a report says: the templates of words.yaml and picture_words.yaml, filled with values of runs.

Python finds values, the templates say them. What comes out is plain text: the page escapes it.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moe_gpt.terminal.numbers import TOKENS, format_count, format_digits, format_number, plural
from moe_gpt.terminal.wrapping import typed

if TYPE_CHECKING:
    from jinja2 import Environment, Template


@functools.cache
def words() -> dict[str, Any]:
    """Return what words.yaml and picture_words.yaml have."""
    files = (Path(__file__).with_name(name) for name in ("words.yaml", "picture_words.yaml"))
    return dict(itertools.chain(*(yaml.safe_load(file.read_text(encoding="utf-8")).items() for file in files)))


def say(template: str, **facts: Any) -> str:
    """Return a template with its values, as one line."""
    return " ".join(_render(template, facts).split())


def paragraphs(template: str, **facts: Any) -> list[str]:
    """Return a template with its values as paragraphs, which lines of it are; empty ones are left out."""
    return [" ".join(line.split()) for line in _render(template, facts).splitlines() if line.strip()]


class Glossary:
    """Explains the terms of words.yaml, each where it first stands on a page."""

    def __init__(self) -> None:
        self._explained: set[str] = set()

    def first_met(self, *texts: str) -> list[tuple[str, str]]:
        """Return the terms that stand in texts for the first time, each with what it means."""
        text, met = " ".join(texts), []
        for term, meaning in words()["terms"].items():
            text, n_times = re.subn(rf"\b(?:{term})s?\b", " ", text, flags=re.IGNORECASE)
            if n_times and term not in self._explained:
                self._explained.add(term)
                met.append((term.partition("|")[0], meaning))
        return met


def _render(template: str, facts: dict[str, Any]) -> str:
    return _compiled(template).render(facts)


@functools.cache
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, autoescape=False)
    environment.filters |= {
        "count": format_count,
        "digits": format_digits,
        "each": _each,
        "fmt": format,
        "number": format_number,
        "plural": plural,
        "quote": lambda path: shlex.quote(typed(path)),
        "tokens": TOKENS.format,
    }
    environment.globals["shared"] = environment.from_string(words()["shared"]).module
    return environment


def _each(rows: Iterable[Sequence[Any]], text: str, separator: str = "; ") -> str:
    """Return a text for each row, with the row's values in its braces."""
    return separator.join(text.format(*row) for row in rows)
