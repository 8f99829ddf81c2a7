"""Settings as one level of dotted keys, to compare configs key by key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values: ``{"a": {"b": [3]}}`` gives ``{"a.b.0": 3}``.

    An empty list or section is kept as a value, so it differs from a missing one. Keys keep their order.
    """
    return {key: leaf for key, leaf in _leaves(value, prefix) if key}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    parts = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    if not isinstance(parts, dict) or not parts:
        yield key, value
        return
    for name, part in parts.items():
        yield from _leaves(part, f"{key}.{name}".lstrip("."))
