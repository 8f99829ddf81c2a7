"""The folder of a run: checks before a run starts, and the lock that keeps other processes out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import filelock

from moe_gpt.config.yaml import to_yaml
from moe_gpt.errors import InputError, shown
from moe_gpt.files.durable import delete_leftovers, replace_file
from moe_gpt.files.inside import inside
from moe_gpt.files.mistaken import odd_name
from moe_gpt.training.saving.checkpoint import RunIdentity
from moe_gpt.training.saving.listing import Damaged, list_checkpoints
from moe_gpt.training.saving.store import set_aside


def check_folder(run_dir: Path, resume: bool) -> None:
    """Raise ``InputError`` if no run can start here, or with ``resume`` continue. Nothing is created."""
    if not resume:
        refuse_existing_run(run_dir)
    check_writable(run_dir)
    check_not_in_use(run_dir)
    check_checkpoints_are_there(run_dir)


def refuse_existing_run(run_dir: Path) -> None:
    """Raise ``InputError`` if the folder holds a run, which a new run would overwrite."""
    if (run_dir / "metrics.jsonl").exists() or list_checkpoints(run_dir):
        raise InputError(
            f"{run_dir} already holds a run; continue it with --resume (resume=True), or choose another --run-dir, or "
            "delete it"
        )


def check_writable(run_dir: Path) -> None:
    """Raise ``InputError`` if the run folder cannot be written, or not be read again. Nothing is created."""
    if reason := odd_name(run_dir):
        raise InputError(f"--run-dir {shown(str(run_dir))} cannot be used: {reason}, or choose another name")
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--run-dir {run_dir} cannot be created, because {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--run-dir {run_dir} cannot be written, because {existing} gives no write permission")


@contextlib.contextmanager
def open_run_folder(
    run_dir: Path, identity: RunIdentity, resumed_from: Path | None, damaged: Collection[Damaged] = ()
) -> Iterator[None]:
    """Create and lock a run folder, write the run's config and tokenizer, and set damaged checkpoints aside.

    Args:
        resumed_from: the checkpoint that the run resumes from.
        damaged: newer checkpoints that cannot be used.

    Raises:
        InputError: if another process trains in the folder, or has trained there since the run was set up.
        OSError: if the folder cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with hold(run_dir):
        unusable = {path for path, _ in damaged}
        newest = [path for path in list_checkpoints(run_dir) if path not in unusable][-1:]
        if newest != ([resumed_from] if resumed_from else []):
            raise InputError(f"{run_dir} changed while this run was being prepared; run the same command again")
        for path in unusable:
            set_aside(path)
        delete_leftovers(run_dir, "")
        replace_file(run_dir / "config.yaml", to_yaml(identity.config))
        replace_file(run_dir / "tokenizer.json", identity.tokenizer.to_json())
        yield


def check_not_in_use(run_dir: Path) -> None:
    """Raise ``InputError`` if another process trains in the folder."""
    if (run_dir / ".lock").exists():
        with hold(run_dir):
            pass


def check_checkpoints_are_there(run_dir: Path) -> None:
    """Raise ``InputError`` if events.jsonl says that a run had checkpoints, and none is left.

    Such a run would start from the beginning and lose its metrics.
    """
    events = inside(run_dir, "events.jsonl")
    if not list_checkpoints(run_dir) and events.is_file():
        text = events.read_text(encoding="utf-8", errors="replace")
        if '"kind": "first_checkpoint"' in text or '"kind": "resume"' in text:
            raise InputError(
                f"{run_dir} had checkpoints, but {run_dir / 'checkpoints'} now has none; restore them, or start a new "
                "run with another --run-dir"
            )


@contextlib.contextmanager
def hold(run_dir: Path, advice: str = "choose another --run-dir") -> Iterator[None]:
    """Lock a run folder, or raise ``InputError`` if another process holds it. A process that dies frees its lock.

    Args:
        advice: ends the error.
    """
    for name in (".lock", "metrics.jsonl", "events.jsonl"):  # written also where they are links
        inside(run_dir, name)
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{run_dir} is in use by another training process; {advice}") from None
    try:
        yield
    finally:
        lock.release()
