"""Settings as YAML with ``section.key=value`` overrides. All problems are reported together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_gpt.config import RunConfig
from moe_gpt.config.section import Section
from moe_gpt.errors import ConfigError, InputError, shown

_PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).resolve().parents[2] / "configs")
CONFIGS = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
"""The configs that come with the package; at the top of a checkout on systems without symbolic links."""


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # that in C, if it is there
    """Safe YAML in which a repeated key is an error, and dates, very long and odd numbers (1:30, 017) are text."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        tag = super().resolve(kind, value, implicit)
        is_odd = re.match(r".*:(timestamp|(int|float)=(.*:|[-+]?0[0-9_]|.{1000}))", f"{tag}={value}")
        return self.DEFAULT_SCALAR_TAG if is_odd else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # keys of a merge (<<) may be given again
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.append(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML without executing anything.

    Raises:
        ConfigError: naming ``origin`` and the line, if the text is not YAML or repeats a key.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        hint = "" if origin.endswith((".yaml", ".yml")) else "; a config is a YAML file such as tiny.yaml"
        raise ConfigError([f"{origin} is not valid YAML: {' '.join(str(error).split())}{hint}"]) from None


def find_config(name: str) -> Path:
    """Return the path of a config that is given as a path or as a name in ``configs/``."""
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    if (Path(name) / "config.yaml").is_file():
        raise FileNotFoundError(f"{name} is a folder; its config is {Path(name) / 'config.yaml'}")
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(f"no config at {name} and none of that name in {CONFIGS}, which has {known}")


def load_run_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML and apply ``section.key=value`` overrides (values are YAML, list items have a number).

    Raises:
        ConfigError: with one line for each problem of the file and the overrides together.
        FileNotFoundError: if there is no such file.
    """
    values = _read(find_config(str(name)))
    problems: list[str] = []
    for override in overrides:
        with _collected(problems):
            _override(values, override)
    with _collected(problems):
        config = RunConfig.from_mapping(values)
    if problems:
        raise ConfigError(problems)
    return config


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Add the problems of an error to the list instead of raising it."""
    try:
        yield
    except InputError as error:
        problems += getattr(error, "problems", [str(error)])


def _read(path: Path) -> dict:
    """Return the sections of a config file."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 text: {error}"]) from None
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise ConfigError([f"{path} must hold sections such as model: and data:, got {shown(values)}"])
    return values


def _override(values: dict, override: str) -> None:
    """Set one key in a file's values, and create missing sections on the way to it."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        hint = "; give one config only" if override.endswith((".yaml", ".yml")) else ""
        raise InputError(f"an override must look like section.key=value, got {override!r}{hint}")
    place: Any = values
    for depth, part in enumerate(parts[:-1], 1):
        part = _key_in(place, part, key, ".".join(parts[: depth - 1]))
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = _new_section(".".join(parts[:depth]), parts[depth], key)
        place = place[part]
    last = _key_in(place, parts[-1], key, ".".join(parts[:-1]))
    place[last] = parse_yaml(text, f"override {key}")


def _new_section(here: str, following: str, key: str) -> dict:
    if following.isdecimal():
        raise InputError(f"{key}: the file has no list {here}; give the whole list, {here}=[...]")
    return {}


def _key_in(place: Any, part: str, key: str, here: str) -> Any:
    """Return one part of an override's key as a key of a section or as an index of a list."""
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise InputError(f"{key}: {here} must be a section, got {shown(place)}")
    if not part.isdecimal() or int(part) >= len(place):
        raise InputError(f"{key}: {here} is a list of {len(place)} entries numbered from 0, got {part!r}")
    return int(part)


def to_plain(section: Section) -> dict[str, Any]:
    """Return the section as plain dicts, lists, numbers and text, every key included."""
    return json.loads(json.dumps(dataclasses.asdict(section)))  # turns tuples into lists


def to_yaml(section: Section) -> str:
    """Return the section as YAML that ``load_run_config`` reads back to an equal one."""
    return yaml.dump(to_plain(section), Dumper=_TextDumper, sort_keys=False, allow_unicode=True)


class _TextDumper(yaml.SafeDumper):
    """Safe YAML that quotes U+0085 (next line), because PyYAML would read it back as a space."""


_TextDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None),
)
