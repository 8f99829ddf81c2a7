"""Numbers that know their name, unit, formula and source, so that a plan can be read, parsed and questioned.

A section's function computes ``{name: value}``; ``quantities.yaml`` says what each name means.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from moe_gpt.errors import InputError
from moe_gpt.plan.data_files import read_data
from moe_gpt.terminal.numbers import Unit, format_value, plural
from moe_gpt.terminal.wrapping import wrap


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One number of a plan."""

    name: str
    """Stable: words joined by underscores, unique within its section; the key in JSON and for ``--explain``."""
    value: float | int | bool | str
    """In the base unit: bytes, seconds, dollars, FLOPs; never a multiple of it."""
    unit: Unit
    label: str
    """What it is, for a table."""
    formula: str
    """How it follows from others, with their names or the usual symbols."""
    source: str
    """Paper with equation or table, datasheet, report; ``counted`` for what is read off the model built on meta."""

    def shown(self) -> str:
        """Return the value for a person, with its unit."""
        return format_value(self.value, self.unit)


@dataclasses.dataclass(frozen=True)
class PlanSection:
    """Quantities that belong together."""

    name: str
    """The key in JSON."""
    title: str
    quantities: Sequence[Quantity]
    notes: Sequence[str] = ()
    """What a reader must know: assumptions, spares, what does not fit and what to change first."""

    @property
    def values(self) -> dict[str, Any]:
        """The quantities' values by their names."""
        return {quantity.name: quantity.value for quantity in self.quantities}

    def __getitem__(self, name: str) -> Any:
        """Return a quantity's value by its name."""
        return self.values[name]


class _Words(NamedTuple):
    """A row of quantities.yaml."""

    unit: Unit
    label: str
    formula: str
    source: str


class _SectionWords(BaseModel, extra="forbid"):
    title: str
    quantities: dict[str, _Words]
    notes: dict[str, str] = {}
    name: str | None = None
    """The section's name in a plan, where it is not the key."""


class Catalogue(BaseModel, extra="forbid"):
    """The content of quantities.yaml; raises ``ValidationError``, with the place, where that is malformed."""

    papers: dict[str, str]
    sections: dict[str, _SectionWords]


@cache
def catalogue() -> Catalogue:
    """Return what quantities.yaml says."""
    return Catalogue.model_validate(read_data("quantities.yaml"))


class _Filler(string.Formatter):
    """Fills in the braces of a text: ``{count:n GPU}`` gives "1 GPU" or "2 GPUs"."""

    def format_field(self, value: Any, spec: str) -> str:
        return plural(value, spec[2:]) if spec.startswith("n ") else super().format_field(value, spec)


class _Namer(_Filler):
    """Puts the name of what is not known in brackets: ``{gpu.name}`` gives "[gpu name]"."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if field_name in kwargs:
            return super().get_field(field_name, args, kwargs)
        return f"[{field_name.removeprefix('options.').replace('.', ' ').replace('_', ' ')}]", field_name

    def format_field(self, value: Any, spec: str) -> str:
        return f"{value} {spec[2:]}s" if spec.startswith("n ") else str(value)


def _fill(text: str, words: Mapping[str, Any]) -> str:
    return _Filler().vformat(text, (), words)


class Member(NamedTuple):
    """The value of a quantity, with words for its label and formula that the rest of its section does not have."""

    value: Any
    words: Mapping[str, Any]


def plan_section(
    key: str, values: Mapping[str, Any], applies: Mapping[str, bool] | None = None, **words: Any
) -> PlanSection:
    """Put the computed numbers of a section beside what quantities.yaml says about them.

    Args:
        key: of the section in quantities.yaml.
        values: name to value (or ``Member``), in the order of the plan. A name that is not in the file must match one
            with a ``*``.
        applies: whether a note does, by its key, for those that do not always.
        words: what the texts of the file name in braces.
    """
    section, papers, applies = catalogue().sections[key], catalogue().papers, applies or {}
    assert applies.keys() <= section.notes.keys(), f"{key} lacks a note of {', '.join(applies)}"

    def quantity(name: str, value: Any) -> Quantity:
        value, own = value if isinstance(value, Member) else (value, {})
        pattern = next((pattern for pattern in section.quantities if fnmatchcase(name, pattern)), name)
        unit, *texts = section.quantities[pattern]
        return Quantity(name, value, unit, *(_fill(text, {**papers, **words, **own}) for text in texts))

    return PlanSection(
        section.name or key,
        _fill(section.title, words),
        [quantity(name, value) for name, value in values.items()],
        [_fill(note, words) for name, note in section.notes.items() if applies.get(name, True)],
    )


def to_json(sections: Iterable[PlanSection]) -> dict[str, dict[str, Any]]:
    """Return ``{section: {name: value}}`` in base units; what is not finite is null, as JSON has no infinity.

    Sections with notes have them in ``notes``: ``{section: [text]}``.
    """
    values: dict[str, dict[str, Any]] = {}
    notes: dict[str, Any] = {}
    for section in sections:
        values[section.name] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in section.values.items()
        }
        if section.notes:
            notes[section.name] = list(section.notes)
    return {**values, "notes": notes} if notes else values


def explain(sections: Iterable[PlanSection], name: str) -> str:
    """Return formula and source of every quantity with that name (``total`` or ``parameters.total``).

    A name that none of the sections has is looked up in quantities.yaml, so that no plan is needed: the value is then
    left out, and words that depend on a plan are in brackets.

    Raises:
        InputError: where there is none, with the names that are like it.
    """
    planned = {f"{section.name}.{q.name}": q for section in sections for q in section.quantities}
    known = _words_of_the_file()
    found = _called(planned, name) or _called(known, name)
    if not found:
        names = [word for key, q in {**planned, **known}.items() for word in (key, q.name)]
        near = difflib.get_close_matches(name, dict.fromkeys(names), n=5, cutoff=0.4)
        raise InputError(f"there is no {name!r} in the plan; nearest: {', '.join(near) or 'none'}")
    return "\n\n".join(_explanation(key, q) for key, q in found.items())


def _called(known: Mapping[str, Quantity], name: str) -> dict[str, Quantity]:
    return {key: q for key, q in known.items() if fnmatchcase(name, key) or fnmatchcase(name, q.name)}


def _explanation(key: str, quantity: Quantity) -> str:
    value = "" if quantity.value == "" else f" = {quantity.shown()}"
    return wrap(f"{key}{value}\n  {quantity.label}\n  formula: {quantity.formula}\n  source:  {quantity.source}")


def _words_of_the_file() -> dict[str, Quantity]:
    """Return every quantity of quantities.yaml, without a value."""
    fill, papers = _Namer().vformat, catalogue().papers
    return {
        f"{key}.{name}": Quantity(name, "", unit, *(fill(text, (), papers) for text in texts))
        for key, section in catalogue().sections.items()
        for name, (unit, *texts) in section.quantities.items()
    }
