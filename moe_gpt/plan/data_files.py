"""The planner's data files."""

from __future__ import annotations

from importlib import resources
from typing import Any

from moe_gpt.config.yaml import parse_yaml


def read_data(name: str) -> Any:
    """Return the content of a YAML file of this folder."""
    return parse_yaml(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"), name)
