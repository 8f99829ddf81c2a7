"""What a run keeps on disk, and who may write to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import filelock

from moe_gpt.config.yaml import to_yaml
from moe_gpt.errors import InputError
from moe_gpt.files.durable import delete_leftovers, replace_file
from moe_gpt.training.saving.checkpoint import RunIdentity, list_checkpoints
from moe_gpt.training.saving.store import Damaged, set_aside


def refuse_existing_run(run_dir: Path) -> None:
    """Check that a new run would not write over another.

    Raises:
        InputError: where the folder holds a run.
    """
    if (run_dir / "metrics.jsonl").exists() or list_checkpoints(run_dir):
        raise InputError(
            f"{run_dir} already holds a run; continue it with --resume, or choose another --run-dir (or delete it)"
        )


def check_writable(run_dir: Path) -> None:
    """Check, without making anything, that the run folder can be written.

    Raises:
        InputError: naming the folder that cannot be written, or the file that is in the way.
    """
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--run-dir {run_dir} cannot be written: no permission in {existing}, or not a folder")


@contextlib.contextmanager
def open_run_folder(
    run_dir: Path, identity: RunIdentity, resumed_from: Path | None, damaged: Collection[Damaged] = ()
) -> Iterator[None]:
    """Hold a run folder for this process, with the run's config and tokenizer in it.

    The lock of a process that died is free. Damaged checkpoints get a name under which nothing takes them for good.

    Args:
        run_dir: made where it is missing.
        identity: what is written into it.
        resumed_from: the checkpoint that the run goes on from.
        damaged: newer checkpoints that cannot be used.

    Raises:
        InputError: where another process is training in it, or has done so since the run was set up.
        OSError: where the folder cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with hold(run_dir):
        unusable = {path for path, _ in damaged}
        newest = [path for path in list_checkpoints(run_dir) if path not in unusable][-1:]
        if newest != ([resumed_from] if resumed_from else []):
            raise InputError(f"{run_dir} changed while this run was being prepared; run the same line again")
        for path in unusable:
            set_aside(path)
        delete_leftovers(run_dir, "")
        replace_file(run_dir / "config.yaml", to_yaml(identity.config))
        replace_file(run_dir / "tokenizer.json", identity.tokenizer.to_json())
        yield


def check_not_in_use(run_dir: Path) -> None:
    """Check that no other process trains in the folder.

    Raises:
        InputError: where one does.
    """
    if (run_dir / ".lock").exists():
        with hold(run_dir):
            pass


def check_checkpoints_are_there(run_dir: Path) -> None:
    """Check that a run without checkpoints never had one: it would be started over, and its metrics lost.

    Raises:
        InputError: where events.jsonl says that it had.
    """
    events = run_dir / "events.jsonl"
    if not list_checkpoints(run_dir) and events.is_file():
        text = events.read_text(encoding="utf-8", errors="replace")
        if '"kind": "first_checkpoint"' in text or '"kind": "resume"' in text:
            raise InputError(
                f"{run_dir} had checkpoints, and now {run_dir / 'checkpoints'} has none; put them back, or start anew "
                "with another --run-dir"
            )


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Lock a run folder for this process; the lock of a process that died is free.

    Raises:
        InputError: where another process holds it.
    """
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{run_dir} is in use by another training process; choose another --run-dir") from None
    try:
        yield
    finally:
        lock.release()
