"""Settings as one level of dotted keys, to compare configs key by key."""

from __future__ import annotations

from typing import Any


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values: ``{"a": {"b": [3]}}`` gives ``{"a.b.0": 3}``.

    An empty list or section is a value, so that it differs from one that is not there. Keys have the settings' order.
    """
    if not isinstance(value, dict | list | tuple) or not value:
        return {prefix: value} if prefix else {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in flatten(part, f"{prefix}.{key}".lstrip(".")).items()}
