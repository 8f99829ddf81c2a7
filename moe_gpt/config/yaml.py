"""Settings as YAML: read strictly, with ``section.key=value`` overrides; everything wrong is reported together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_gpt.config import RunConfig
from moe_gpt.config.section import Section
from moe_gpt.errors import ConfigError, InputError, shown

_PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).resolve().parents[2] / "configs")
CONFIGS = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
"""The configs that come with the package; a checkout where links do not work has them at its top."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of a silent replacement."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: its keys may be given again
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.append(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML without executing anything.

    Raises:
        ConfigError: naming ``origin`` and the line, where the text is not YAML or repeats a key.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([f"{origin} is not valid YAML: {' '.join(str(error).split())}"]) from None


def find_config(name: str) -> Path:
    """Return the path of a config given as a path or as a name in ``configs/``.

    Raises:
        FileNotFoundError: naming what was looked for and the configs there are.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(f"no config at {name} and none of that name in {CONFIGS}; there are {known}")


def load_run_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML and apply ``section.key=value`` overrides (values are YAML, list items have a number).

    Raises:
        ConfigError: with one line for each problem of the file and the overrides together.
        FileNotFoundError: where there is no such file.
    """
    path = find_config(str(name))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 text: {error}"]) from None
    values = parse_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError([f"{path} must hold sections such as model: and data:, got {shown(values)}"])
    problems, config = [], None
    for override in overrides:
        try:
            _override(values, override)
        except InputError as error:
            problems.append(str(error))
    try:
        config = RunConfig.from_mapping(values)
    except ConfigError as error:
        problems += error.problems
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _override(values: dict, override: str) -> None:
    """Set one key of a file's values, and make the sections on the way there."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(f"an override must look like section.key=value, got {override!r}")
    place: Any = values
    for depth, (part, following) in enumerate(zip(parts, parts[1:], strict=False), 1):
        part, here = _key_in(place, part, key, ".".join(parts[: depth - 1])), ".".join(parts[:depth])
        if isinstance(place, dict) and place.get(part) is None:
            if following.isdecimal():
                raise InputError(f"{key}: the file has no list {here}; give all of it, {here}=[...]")
            place[part] = {}
        place = place[part]
    last = _key_in(place, parts[-1], key, ".".join(parts[:-1]))
    place[last] = parse_yaml(text, f"override {key}")


def _key_in(place: Any, part: str, key: str, here: str) -> Any:
    """Return what one part of an override's key is at its place: a key of a section, or a number of a list."""
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise InputError(f"{key}: {here} is not a section, it is {shown(place)}")
    if not part.isdecimal() or int(part) >= len(place):
        raise InputError(f"{key}: {here} is a list of {len(place)} entries numbered from 0, got {part!r}")
    return int(part)


def to_plain(section: Section) -> dict[str, Any]:
    """Return the section as plain dicts, lists, numbers and text, every key included."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(section))


def to_yaml(section: Section) -> str:
    """Return the section as YAML that ``load_run_config`` reads back to an equal one."""
    return yaml.dump(to_plain(section), Dumper=_TextDumper, sort_keys=False, allow_unicode=True)


class _TextDumper(yaml.SafeDumper):
    """Safe YAML that also keeps U+0085 (next line), which PyYAML would write without quotes and read as a space."""


_TextDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None),
)
