"""Reading files with a JSON object in each line, as a run writes them, damaged lines and all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.files.inside import inside


class FoundLines(NamedTuple):
    """What a file of JSON lines has."""

    lines: list[dict[str, Any]]
    n_left_out: int
    """Damaged lines; where reading stops at damage, all lines from there on."""


def read_json_lines(
    path: Path, is_sound: Callable[[dict[str, Any]], bool] = lambda line: True, stops_at_damage: bool = False
) -> FoundLines:
    """Return the objects of a file, without lines that are damaged: cut off, no object, or not sound.

    Args:
        path: of the file, in UTF-8; what is not UTF-8 in it damages its line alone.
        is_sound: whether an object has what it must have.
        stops_at_damage: leave out everything that follows a damaged line, as whoever goes on writing the file must.

    Raises:
        OSError: where the file cannot be read.
        InputError: where it is a link out of its folder, or no file.
    """
    lines, n_left_out = [], 0
    with open(
        inside(path.parent, path.name), encoding="utf-8", errors="replace"
    ) as file:  # a line at a time: the file may be large
        for text in file:
            line = None if n_left_out and stops_at_damage else _parse(text, is_sound)
            if line is None:
                n_left_out += 1
            else:
                lines.append(line)
    return FoundLines(lines, n_left_out)


def _parse(text: str, is_sound: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for a number of thousands of digits
        return None
    return line if isinstance(line, dict) and is_sound(line) else None
