"""Names of validation scores in metrics.jsonl: ``val/<source>/<key>``, such as ``val/prose/ce_loss``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

VALIDATION = "val/"
"""All keys of an evaluation begin with it, those that are of no source too (``val/max_violation``)."""


class MetricName(NamedTuple):
    """The name of one source's score; ``str`` gives its key in metrics.jsonl."""

    source: str
    key: str

    def __str__(self) -> str:
        return f"{VALIDATION}{self.source}/{self.key}"

    @classmethod
    def parse(cls, text: str) -> MetricName | None:
        """Return the name that a key of metrics.jsonl stands for; None for a key that is no source's score."""
        parts = text.split("/")
        return cls(*parts[1:]) if text.startswith(VALIDATION) and len(parts) == 3 else None


def scored_sources(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sources that evaluations have scores of, in the order of their first score."""
    names = (MetricName.parse(key) for line in lines for key in line)
    return list(dict.fromkeys(name.source for name in names if name))
