"""The checkpoints of a run: finding good ones, saving new ones in the background, and deleting old ones."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moe_gpt.config import CheckpointConfig
from moe_gpt.distributed.process import SOLO, Team
from moe_gpt.errors import InputError
from moe_gpt.files.durable import delete_folder, delete_leftovers
from moe_gpt.training.saving.checkpoint import RunIdentity, Snapshot, read_state, take_snapshot
from moe_gpt.training.saving.listing import list_checkpoints, problem_of
from moe_gpt.training.saving.size import checkpoint_bytes
from moe_gpt.training.saving.write import write_checkpoint, write_shards
from moe_gpt.training.step import TrainState


def find_checkpoint_to_go_back_to(run_dir: Path) -> Path | None:
    """Return the newest good checkpoint that was not saved within a series of non-finite steps.

    Scheduled checkpoints come first. An interruption leaves others, and an interrupted run must go back to the same
    step as an uninterrupted one.
    """
    fallback = None
    for path in reversed(list_checkpoints(run_dir)):
        state = None if problem_of(path) else _readable_state(path)
        if state and not state["skips_in_a_row"]:
            if state["is_scheduled"]:
                return path
            fallback = fallback or path
    return fallback


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that nothing uses it again, and return its new path."""
    places = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    return path.rename(next(place for place in places if not place.exists()))


def list_set_aside(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were set aside, oldest first."""
    return sorted(run_dir.glob("checkpoints/step_*.damaged-*"))


def checkpoints_not_kept(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """Return the checkpoints that the config does not keep, oldest first.

    Kept are the newest, the best by validation loss, every n-th, and always the one to go back to after failed steps.
    """
    checkpoints = list_checkpoints(run_dir)
    states = {path: state for path in checkpoints if (state := _readable_state(path))}
    kept = {*checkpoints[-config.keep_last :], *_ways_back(states)}
    if config.keep_best:
        kept.update(_best(states))
    if config.keep_every_steps:
        kept.update(path for path, state in states.items() if state["step"] % config.keep_every_steps == 0)
    return [path for path in checkpoints if path not in kept]


def _ways_back(states: Mapping[Path, dict[str, Any]]) -> Iterable[Path]:
    """Return the newest scheduled and the newest other checkpoint, except those saved amid non-finite steps."""
    return {state["is_scheduled"]: path for path, state in states.items() if not state["skips_in_a_row"]}.values()


def _best(states: Mapping[Path, dict[str, Any]]) -> list[Path]:
    """Return the checkpoint with the lowest validation loss, if any was evaluated."""
    scored = [path for path, state in states.items() if state["score"] is not None]
    return sorted(scored, key=lambda path: states[path]["score"])[:1]


def _readable_state(path: Path) -> dict[str, Any] | None:
    try:
        return read_state(path)
    except (InputError, OSError):
        return None


def prunable_checkpoints(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """Return the result of ``checkpoints_not_kept``; raise ``InputError`` if no kept checkpoint is undamaged."""
    doomed = checkpoints_not_kept(run_dir, config)
    kept = [path for path in list_checkpoints(run_dir) if path not in doomed]
    if doomed and all(problem_of(path) for path in reversed(kept)):
        raise InputError(f"{run_dir}: nothing is deleted, because every checkpoint that would be kept is damaged")
    return doomed


def prune(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """Delete the checkpoints of ``prunable_checkpoints``, which also has the errors, and return them."""
    doomed = prunable_checkpoints(run_dir, config)
    for path in doomed:
        delete_folder(path)
    return doomed


_LARGEST_GATHERED = 50 * 10**9
"""Bytes of weights and optimizer that rank 0 still writes alone."""
_numbers = itertools.count()
"""Numbers the saves of a process, the same on all ranks."""


class CheckpointSaver:
    """Saves checkpoints one after another, each after the previous one is on disk.

    The caller must hold the run folder. A background save delays training only while the state is copied and while the
    previous save is still running. The next call raises the error of a background save.

    Args:
        identity: saved with every checkpoint.
        config: says which checkpoints to keep.
        team: its rank 0 writes, or each rank its shard.
    """

    def __init__(self, run_dir: Path, identity: RunIdentity, config: CheckpointConfig, team: Team = SOLO) -> None:
        self._run_dir, self._identity, self._config, self._team = run_dir, identity, config, team
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.saved: list[Path] = []
        """The checkpoints that are on disk."""

    @property
    def has_failed(self) -> bool:
        """Whether a background save has failed; ``wait`` raises its error."""
        return self._error is not None

    def save(
        self,
        state: TrainState,
        score: float | None = None,
        wait: bool = False,
        is_scheduled: bool = True,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Save ``run_dir/checkpoints/step_XXXXXXXX``, then delete the checkpoints that are not kept.

        Args:
            score: mean validation loss, if this step was evaluated.
            wait: return only when the checkpoint is on disk; otherwise the config decides.
            is_scheduled: whether ``every_steps`` asked for it.
            first: is called before it is written.

        Raises:
            OSError: if this checkpoint or the previous one cannot be written; earlier ones are intact. On all ranks,
                unless it is written in the background.
        """
        self.wait()
        in_background = self._config.in_background and not wait
        in_shards = self._writes_shards()
        snapshot = take_snapshot(state, score, is_scheduled, in_background, self._team, in_shards)
        folder = self._run_dir / "checkpoints" / f"step_{state.step:08d}"
        team = self._team.in_another_thread(f"save {next(_numbers)}")
        write = partial(self._write, folder, snapshot, team, in_shards)
        if in_background and team.is_main:
            first()
        if in_background and (team.is_main or in_shards):
            guarded = partial(self._guarded, write)
            self._thread = threading.Thread(target=guarded, name="save checkpoint", daemon=True)
            self._thread.start()
        elif in_shards:
            write(first)
        elif not in_background:
            team.from_main(lambda: write(first))

    def _writes_shards(self) -> bool:
        """Whether each rank writes its own part."""
        if self._config.format != "auto":
            return self._config.format == "sharded"
        return self._team.size > 1 and checkpoint_bytes(self._identity.config).total > _LARGEST_GATHERED

    def _write(
        self,
        folder: Path,
        snapshot: Snapshot,
        team: Team,
        in_shards: bool,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint, by all ranks where it has shards, and delete those that are not kept."""

        def prepare() -> None:
            first()
            folder.parent.mkdir(parents=True, exist_ok=True)
            delete_leftovers(folder.parent, "step_")

        if in_shards:
            team.from_main(prepare)
            write_shards(folder, snapshot, self._identity, team)
        else:
            prepare()
            write_checkpoint(folder, snapshot, self._identity)
        self.saved.append(folder)
        if team.is_main:
            for path in checkpoints_not_kept(self._run_dir, self._config):  # the newest is kept, and it is good
                delete_folder(path)

    def wait(self) -> None:
        """Wait for the background save, and raise its ``OSError`` if it failed."""
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
