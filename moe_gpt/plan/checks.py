"""What every part of the planner shares: checks of arguments by the kinds that settings have, and its data files."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moe_gpt.config.section import expectation
from moe_gpt.config.yaml import parse_yaml
from moe_gpt.errors import InputError, shown


def require(kind: Any, **values: Any) -> None:
    """Check that all values are of a kind, such as ``Positive`` or ``Count`` of ``config/section.py``.

    Raises:
        InputError: with the name and the value of the first that is not.
    """
    for name, value in values.items():
        try:
            _adapter(kind).validate_python(value)
        except ValidationError:
            raise InputError(f"{name} must be {expectation(kind)}, got {shown(value)}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def read_data(name: str) -> Any:
    """Return the content of a YAML file of this folder."""
    return parse_yaml(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"), name)
