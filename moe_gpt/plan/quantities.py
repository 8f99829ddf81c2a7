"""Numbers that know their name, unit, formula and source, so that a plan can be read, parsed and questioned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from moe_gpt.validation import InputError

Unit = Literal[
    "parameters", "FLOPs", "FLOPs/token", "FLOP/s", "bytes", "bytes/token", "bytes/s", "seconds", "dollars", "tokens",
    "tokens/s", "nats/token", "fraction", "ratio", "GPUs", "count", "text",
]  # fmt: skip
_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_IN_WORDS = {"FLOPs": "FLOP", "FLOPs/token": "FLOP/token", "FLOP/s": "FLOP/s"}


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


def format_value(value: float | int | bool | str, unit: Unit) -> str:
    """Return a value with three or four significant digits and its unit, as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "unbounded" if value > 0 else "unknown"
    if unit in _FORMATS:
        return _FORMATS[unit](value)
    return _scaled(value, _IN_WORDS.get(unit, unit))


def _scaled(value: float, unit: str) -> str:
    size, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), (1.0, ""))
    scaled = value / size
    number = f"{scaled:.0f}" if scaled == int(scaled) and abs(scaled) < 1000 else f"{scaled:.4g}"
    if not unit:  # counts: millions, billions, trillions
        prefix = {"": "", "k": " thousand", "M": " million", "G": " billion", "T": " trillion"}.get(prefix, "")
        return f"{number}{prefix}" if prefix or size == 1.0 else f"{value:.4g}"
    return f"{number} {prefix}{unit}"


def _duration(seconds: float) -> str:
    for size, name in (
        (86_400 * 365.25, "years"),
        (86_400, "days"),
        (3600, "hours"),
        (60, "minutes"),
        (1, "s"),
        (1e-3, "ms"),
    ):
        if seconds >= 2 * size or (seconds >= size and size <= 1):
            return f"{seconds / size:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"


def _count(value: float) -> str:
    """Return a number of things: in full below a million."""
    if abs(value) >= 1e6:
        return _scaled(value, "")
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _dollars(value: float) -> str:
    if abs(value) >= 1000:
        return f"${_scaled(value, '')}"
    return f"${value:,.2f}" if abs(value) >= 1 or value == 0 else f"${value:.3g}"


_FORMATS: dict[str, Callable[[float], str]] = {
    "fraction": lambda value: f"{100 * value:.3g} %",
    "ratio": lambda value: f"{value:.3g} x",
    "seconds": _duration,
    "dollars": _dollars,
    "count": _count,
    "GPUs": _count,
    "tokens": _count,
    "parameters": _count,
    "nats/token": lambda value: f"{value:.3f} nats/token",
    "bytes": lambda value: _scaled(value, "B"),
    "bytes/token": lambda value: _scaled(value, "B/token"),
    "bytes/s": lambda value: _scaled(value, "B/s"),
    "tokens/s": lambda value: f"{_scaled(value, '')} tokens/s",
}


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
    import difflib

    known = {f"{section.name}.{q.name}": q for section in sections for q in section.quantities}
    found = {key: q for key, q in known.items() if name in (key, q.name)}
    if not found:
        near = difflib.get_close_matches(name, [*known, *(q.name for q in known.values())], n=5, cutoff=0.4)
        raise InputError(f"there is no {name!r} in the plan; nearest: {', '.join(near) or 'none'}")
    return "\n\n".join(
        f"{key} = {q.shown()}\n  {q.label}\n  formula: {q.formula}\n  source:  {q.source}" for key, q in found.items()
    )
