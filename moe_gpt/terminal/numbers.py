"""Numbers as people write them: counts, values with their unit, durations, money."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

Unit = Literal[
    "parameters", "FLOPs", "FLOPs/token", "FLOP/s", "bytes", "bytes/token", "bytes/s", "seconds", "dollars", "tokens",
    "tokens/s", "nats/token", "fraction", "ratio", "GPUs", "count", "text",
]  # fmt: skip
_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_IN_WORDS = {"FLOPs": "FLOP", "FLOPs/token": "FLOP/token"}
_DURATIONS = ((86_400 * 365.25, "years"), (86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "s"), (1e-3, "ms"))


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
    for size, name in _DURATIONS:
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


def format_number(value: Any) -> str:
    """Return a value for people: four significant digits of a fraction, a dash for what is not known, text as it is."""
    if value is None or isinstance(value, str | bool):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 4:
        return f"{value:.{3 - size}f}".rstrip("0").rstrip(".") if size < 3 else f"{value:.0f}"
    return f"{value:,.0f}" if 4 <= size < 15 else f"{value:.2e}"


def format_count(value: float) -> str:
    """Return a count in three digits: 850, 12.3k, 4.72M, 1.8B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
