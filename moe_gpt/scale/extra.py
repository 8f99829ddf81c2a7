"""Whether the packages of the extra ``moe_gpt[scale]`` are there, asked before files that need them are imported."""

from __future__ import annotations

import importlib.util

from moe_gpt.config import DataConfig
from moe_gpt.errors import InputError


def require_packages(engine: str, config: DataConfig) -> None:
    """Raise ``InputError`` if a package that this preparation needs is missing."""
    needed = {"datatrove": f"--engine {engine}"}
    if engine == "ray":
        needed["ray"] = "--engine ray"
    if {*config.filters} - {"regex", "language"} or config.near_duplicates.remove:
        needed["spacy"] = "cutting text into words, for data.filters and data.near_duplicates,"
    for package, what in needed.items():
        if not importlib.util.find_spec(package):
            raise InputError(f"{what} needs the package {package}; run pip install 'moe_gpt[scale]'")
