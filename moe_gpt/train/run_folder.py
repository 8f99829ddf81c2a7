"""What a run keeps on disk, and who may write to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from moe_gpt.train.checkpoint import list_checkpoints
from moe_gpt.validation import InputError


def refuse_existing_run(run_dir: Path) -> None:
    """Check that a new run would not write over another.

    Raises:
        InputError: where the folder holds a run.
    """
    if (run_dir / "config.yaml").exists() or list_checkpoints(run_dir):
        raise InputError(
            f"{run_dir} already holds a run; continue it with --resume, or choose another --run-dir (or delete it)"
        )


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock of a process that died is free.

    Raises:
        InputError: where another process is training in it.
        OSError: where the folder cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{run_dir} is in use by another training process; choose another --run-dir") from None
    try:
        yield
    finally:
        lock.release()
