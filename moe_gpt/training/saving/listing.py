"""The checkpoints of a run: which there are, and which of them can be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from moe_gpt.errors import InputError
from moe_gpt.training.saving.checkpoint import read_state
from moe_gpt.training.saving.manifest import FILES, STATE, verify_files


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first, without reading them."""
    return [path for path in named_as_checkpoints(run_dir) if path.is_dir()]


def named_as_checkpoints(run_dir: Path) -> list[Path]:
    """Return everything in a run that has a checkpoint's name, oldest first: also files, and links to nothing."""
    found = [path for path in run_dir.glob("checkpoints/step_*") if is_named_as_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_named_as_checkpoint(path: Path) -> bool:
    """Whether a path has a checkpoint's name."""
    return re.fullmatch(r"step_\d{8,}", path.name) is not None


def problem_of(path: Path, names: tuple[str, ...] = FILES) -> str | None:
    """Say why a checkpoint cannot be used; None if it can. ``verify_checkpoint`` explains ``names``."""
    if not path.is_dir():
        return f"checkpoint {path} is a {'link that leads nowhere' if path.is_symlink() else 'file, not a folder'}"
    if not any(path.iterdir()):
        return f"checkpoint {path} is an empty folder"
    try:
        verify_checkpoint(path, names)
    except (InputError, OSError) as error:
        return str(error)
    return None


class Damaged(NamedTuple):
    """A checkpoint that cannot be used."""

    path: Path
    problem: str


def find_good_checkpoint(run_dir: Path, names: tuple[str, ...] = FILES) -> tuple[Path | None, list[Damaged]]:
    """Return a run's newest undamaged checkpoint, None if there is none, and the newer ones that are damaged."""
    damaged: list[Damaged] = []
    for path in reversed(named_as_checkpoints(run_dir)):
        problem = problem_of(path, names)
        if problem is None:
            return path, damaged
        damaged.append(Damaged(path, problem))
    return None, damaged


def verify_checkpoint(path: Path, names: tuple[str, ...] = FILES) -> None:
    """Compare all files of a checkpoint, or only ``names``, with its manifest.

    Sizes are compared first. A file that has another size, or that is not in the manifest, is never read.

    Raises:
        InputError: naming the checkpoint and the file that is missing, changed or foreign; or if the folder's name has
            another step than the state.
    """
    verify_files(path, names)
    step = read_state(path)["step"]
    if is_named_as_checkpoint(path) and int(path.name[5:]) != step:
        raise InputError(
            f"checkpoint {path}: {STATE} is of step {step}; if the folder was renamed, name it step_{step:08d}"
        )
