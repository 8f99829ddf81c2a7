"""How results are shown: columns of a table are texts with the results' keys in braces, and a unit after a colon."""

from __future__ import annotations

import string
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from moe_gpt.terminal.numbers import Unit, format_value
from moe_gpt.terminal.tables import format_table

Result = dict[str, Any]
"""What ``moe-gpt bench --json`` writes of a measurement, in base units."""


class _InUnits(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        if spec not in typing.get_args(Unit):
            return super().format_field(value, spec)
        return format_value(round(value) if spec == "count" else value, spec)  # type: ignore[arg-type]


def fill(text: str, result: Mapping[str, Any]) -> str:
    """Fill in a text: ``"{memory:bytes}"`` becomes "1.56 GB", and what Python's own formats say is done as well."""
    return _InUnits().vformat(text, (), result)


def tabulate(results: Sequence[Result], columns: Mapping[str, str], first_over: str = "") -> str:
    """Return a line for each result, and in each column its text, filled in.

    The texts may name ``ratio``: the first result's value of the key ``first_over``, over the result's own.
    """
    ratios = ({"ratio": results[0][first_over] / result[first_over]} if first_over else {} for result in results)
    words = [result | ratio for result, ratio in zip(results, ratios, strict=True)]
    return format_table(list(columns), [[fill(text, word) for text in columns.values()] for word in words])
