"""Numbers that know their name, unit, formula and source, so that a plan can be read, parsed and questioned.

A section's function computes ``{name: value}``; ``quantities.yaml`` says what each name means.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from moe_gpt.errors import InputError
from moe_gpt.plan.data_files import read_data
from moe_gpt.terminal.numbers import Unit, format_value


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

    def __getitem__(self, name: str) -> Any:
        """Return a quantity's value by its name."""
        return next(quantity.value for quantity in self.quantities if quantity.name == name)


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
        label, formula, source = (text.format(**papers, **words, **own) for text in texts)
        return Quantity(name, value, unit, label, formula, source)

    return PlanSection(
        section.name or key,
        section.title.format(**words),
        [quantity(name, value) for name, value in values.items()],
        [note.format(**words) for name, note in section.notes.items() if applies.get(name, True)],
    )


def to_json(sections: Iterable[PlanSection]) -> dict[str, dict[str, Any]]:
    """Return ``{section: {name: value}}`` in base units; what is not finite is null, as JSON has no infinity.

    Sections with notes have them in ``notes``: ``{section: [text]}``.
    """
    sections = list(sections)
    notes = {section.name: list(section.notes) for section in sections if section.notes}
    values: dict[str, dict[str, Any]] = {
        section.name: {
            q.name: None if isinstance(q.value, float) and not math.isfinite(q.value) else q.value
            for q in section.quantities
        }
        for section in sections
    }
    return {**values, "notes": notes} if notes else values


def explain(sections: Sequence[PlanSection], name: str) -> str:
    """Return formula and source of every quantity with that name (``total`` or ``parameters.total``).

    Raises:
        InputError: where there is none, with the names that are like it.
    """
    known = {f"{section.name}.{q.name}": q for section in sections for q in section.quantities}
    found = {key: q for key, q in known.items() if name in (key, q.name)}
    if not found:
        near = difflib.get_close_matches(name, [*known, *(q.name for q in known.values())], n=5, cutoff=0.4)
        raise InputError(f"there is no {name!r} in the plan; nearest: {', '.join(near) or 'none'}")
    return "\n\n".join(
        f"{key} = {q.shown()}\n  {q.label}\n  formula: {q.formula}\n  source:  {q.source}" for key, q in found.items()
    )
