"""Numbers as people write them: counts, values with their unit, durations, money."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Unit = Literal[
    "parameters", "FLOPs", "FLOPs/token", "FLOP/s", "PF-days", "bytes", "bytes/token", "bytes/s", "seconds", "dollars",
    "tokens", "tokens/s", "nats/token", "fraction", "ratio", "GPUs", "count", "text",
]  # fmt: skip
_IN_WORDS = {"FLOPs": "FLOP", "FLOPs/token": "FLOP/token"}


class Units(NamedTuple):
    """Ascending units of a quantity: how much each is, and what it is called."""

    sizes: tuple[float, ...]
    names: tuple[str, ...]
    least: float = 1.0
    """How many of a unit there must be for it to be used."""

    def fitting(self, value: float) -> tuple[float, str]:
        """Return size and name of the largest unit of which there are enough, or else of the smallest."""
        index = max(0, sum(self.least * size <= abs(value) for size in self.sizes) - 1)
        return self.sizes[index], self.names[index]

    def format(self, value: float) -> str:
        """Return a value with four significant digits and the unit that fits it."""
        size, name = self.fitting(value)
        return f"{format_digits(value / size)} {name}"


def _counted(what: str) -> Units:
    names = tuple(f"{word} {what}" for word in ("thousand", "million", "billion", "trillion"))
    return Units((1, 1e3, 1e6, 1e9, 1e12), (what, *names))


TOKENS, PARAMETERS = _counted("tokens"), _counted("parameters")
FLOPS = Units((1, 1e9, 1e12, 1e15, 1e18, 1e21), ("FLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"))
TIME = Units((1, 60, 3600, 86_400), ("seconds", "minutes", "hours", "days"))
_PREFIXES = Units((1, 1e3, 1e6, 1e9, 1e12, 1e15, 1e18, 1e21, 1e24), ("", "k", "M", "G", "T", "P", "E", "Z", "Y"))
_LETTERS = Units((1, 1e3, 1e6, 1e9, 1e12), ("", "k", "M", "B", "T"), least=0.9995)
_SHORT = Units((1e-6, 1e-3, 1), ("us", "ms", "s"))
_LONG = Units((60, 3600, 86_400, 86_400 * 365.25), ("minutes", "hours", "days", "years"), least=2)


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
    size, prefix = _PREFIXES.fitting(value)
    scaled = value / size
    number = f"{scaled:.0f}" if scaled == int(scaled) and abs(scaled) < 1000 else f"{scaled:.4g}"
    if not unit:  # counts: millions, billions, trillions
        prefix = {"": "", "k": " thousand", "M": " million", "G": " billion", "T": " trillion"}.get(prefix, "")
        return f"{number}{prefix}" if prefix or size == 1.0 else f"{value:.4g}"
    return f"{number} {prefix}{unit}"


def _duration(seconds: float) -> str:
    size, name = (_LONG if seconds >= 120 else _SHORT).fitting(seconds)
    return f"{seconds / size:.3g} {name}"


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
    "PF-days": lambda value: f"{_count(float(f'{value:.4g}'))} PF-days",
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
    is_whole = isinstance(value, int) or (value == round(value) and abs(value) < 1e15)
    return f"{int(value):,}" if is_whole else _fraction(value)


def _fraction(value: float) -> str:
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 4:
        return f"{value:.{3 - size}f}".rstrip("0").rstrip(".") if size < 3 else f"{value:.0f}"
    return f"{value:,.0f}" if 4 <= size < 15 else f"{value:.2e}"


def format_digits(value: float) -> str:
    """Return a number with at most four significant digits, never with an exponent: 0.00012, 3.5, 21790."""
    return f"{decimal.Decimal(f'{value:.3e}').normalize():f}"


def format_count(value: float) -> str:
    """Return a count in three digits: 850, 12.3k, 4.72M, 1.8B."""
    size, letter = _LETTERS.fitting(value)
    return f"{value / size:.3g}{letter}"


def plural(n: int, noun: str) -> str:
    """Return a number of things: 1 step, 2 steps, 1,000 steps."""
    return f"{n:,} {noun}{'s' * (n != 1)}"
