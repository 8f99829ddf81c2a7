"""The checkpoints of a run: which are good, which are kept, and saving a new one while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.config import CheckpointConfig
from moe_gpt.errors import InputError
from moe_gpt.files.durable import delete_folder, delete_leftovers
from moe_gpt.training.saving.checkpoint import (
    RunIdentity,
    list_checkpoints,
    read_state,
    take_snapshot,
    verify_checkpoint,
    write_checkpoint,
)
from moe_gpt.training.step import TrainState


class Damaged(NamedTuple):
    """A checkpoint that cannot be used."""

    path: Path
    problem: str


def find_good_checkpoint(run_dir: Path) -> tuple[Path | None, list[Damaged]]:
    """Return a run's newest checkpoint whose files are all what was saved, and the newer ones that are not.

    None and an empty list where the run has no checkpoints.
    """
    damaged = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
        except (InputError, OSError) as error:
            damaged.append(Damaged(path, str(error)))
        else:
            return path, damaged
    return None, damaged


def find_checkpoint_to_go_back_to(run_dir: Path) -> Path | None:
    """Return the newest good checkpoint that was not saved within a series of non-finite steps.

    One that ``every_steps`` asked for, if there is any: an interruption leaves others, and a run that was interrupted
    must go back to the same step as one that was not.
    """
    candidates = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
            state = read_state(path)
        except (InputError, OSError):
            continue
        if not state["skips_in_a_row"]:
            if state["is_scheduled"]:
                return path
            candidates.append(path)
    return candidates[0] if candidates else None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is never taken for one, and return its new place."""
    number = 1
    while (place := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(place)


def list_set_aside(run_dir: Path) -> list[Path]:
    """Return what was set aside, oldest first."""
    return sorted(run_dir.glob("checkpoints/step_*.damaged-*"))


def checkpoints_not_kept(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """Return the checkpoints that the config does not keep, oldest first.

    Kept are the newest, the best by validation, every n-th, and always the one to go back to when steps fail.
    """
    checkpoints = list_checkpoints(run_dir)
    kept = set(checkpoints[-config.keep_last :])
    states = {path: state for path in checkpoints if (state := _readable_state(path))}
    kept.update(_ways_back(states))
    if config.keep_best:
        kept.update(_best(states))
    if config.keep_every_steps:
        kept.update(path for path, state in states.items() if state["step"] % config.keep_every_steps == 0)
    return [path for path in checkpoints if path not in kept]


def _ways_back(states: Mapping[Path, dict[str, Any]]) -> Iterable[Path]:
    """Return the newest checkpoints, scheduled and not, that were not saved within a series of non-finite steps."""
    return {state["is_scheduled"]: path for path, state in states.items() if not state["skips_in_a_row"]}.values()


def _best(states: Mapping[Path, dict[str, Any]]) -> list[Path]:
    """Return the checkpoint with the lowest validation loss; none where none was evaluated."""
    scored = [path for path, state in states.items() if state["score"] is not None]
    return sorted(scored, key=lambda path: states[path]["score"])[:1]


def _readable_state(path: Path) -> dict[str, Any] | None:
    try:
        return read_state(path)
    except (InputError, OSError):
        return None


def prunable_checkpoints(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """Return what ``checkpoints_not_kept`` returns, provided that a checkpoint that is kept has all its files.

    Raises:
        InputError: where every checkpoint that would be kept is damaged.
    """
    doomed = checkpoints_not_kept(run_dir, config)
    kept = [path for path in list_checkpoints(run_dir) if path not in doomed]
    if doomed and not any(_is_good(path) for path in reversed(kept)):
        raise InputError(f"{run_dir}: nothing is pruned, because no checkpoint that would be kept is undamaged")
    return doomed


def prune(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """Delete what ``prunable_checkpoints`` returns, and return it.

    Raises:
        InputError: where every checkpoint that would be kept is damaged; then nothing is deleted.
    """
    doomed = prunable_checkpoints(run_dir, config)
    for path in doomed:
        delete_folder(path)
    return doomed


def _is_good(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except (InputError, OSError):
        return False
    return True


class CheckpointSaver:
    """Saves one checkpoint after another; a save begins only when the one before is on the disk.

    Use it only while holding the run folder. In the background, training waits while its state is copied, and for the
    save before, where that is not done yet. An error of a background save is raised by the next call.

    Args:
        run_dir: the run.
        identity: saved with every checkpoint.
        config: which to keep.
    """

    def __init__(self, run_dir: Path, identity: RunIdentity, config: CheckpointConfig) -> None:
        self._run_dir, self._identity, self._config = run_dir, identity, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.saved: list[Path] = []
        """The checkpoints that were written."""

    @property
    def has_failed(self) -> bool:
        """Whether a background save has ended with an error that ``wait`` will raise."""
        return self._error is not None

    def save(
        self, state: TrainState, score: float | None = None, wait: bool = False, is_scheduled: bool = True
    ) -> None:
        """Save ``run_dir/checkpoints/step_XXXXXXXX``, then prune.

        Args:
            state: what is being trained.
            score: mean validation loss at this step, where it was evaluated.
            wait: return when the checkpoint is on the disk; otherwise as the config says.
            is_scheduled: whether ``every_steps`` asked for it.

        Raises:
            OSError: where this save, or the one before it, cannot be written; earlier checkpoints are intact.
        """
        self.wait()
        in_background = self._config.in_background and not wait
        snapshot = take_snapshot(state, score, is_scheduled, copy=in_background)
        folder = self._run_dir / "checkpoints" / f"step_{state.step:08d}"

        def write() -> None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            delete_leftovers(folder.parent, "step_")
            write_checkpoint(folder, snapshot, self._identity)
            self.saved.append(folder)
            for path in checkpoints_not_kept(self._run_dir, self._config):  # the newest is kept, and it is good
                delete_folder(path)

        if in_background:
            self._thread = threading.Thread(target=self._guarded, args=(write,), name="save checkpoint", daemon=True)
            self._thread.start()
        else:
            write()

    def wait(self) -> None:
        """Return when nothing is being saved.

        Raises:
            OSError: where the save that was under way failed.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 (raised by the next call, in the thread that trains)
            self._error = error
