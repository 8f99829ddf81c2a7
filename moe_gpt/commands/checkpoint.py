"""``moe-gpt checkpoint``: look after a run's checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from moe_gpt.commands.options import Switch, Whole, WholeOrZero, flat

_WAIT = "wait until it ends"


def find_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first.

    Raises:
        FileNotFoundError: where there is none.
    """
    from moe_gpt.training.saving.listing import list_checkpoints

    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise FileNotFoundError(f"no checkpoints in {run}; give a run folder such as runs/tiny")
    return checkpoints


def list_(run: Path) -> None:
    """Show each checkpoint's step, tokens, size and validation loss; the files' contents are not checked.

    Args:
        run: A run folder.
    """
    from moe_gpt.errors import InputError
    from moe_gpt.terminal.tables import format_table
    from moe_gpt.training.saving.checkpoint import read_state
    from moe_gpt.training.saving.store import list_set_aside

    rows, unreadable = [], []
    checkpoints = find_checkpoints(run)
    for path in checkpoints:
        size = sum(file.stat().st_size for file in path.iterdir())
        try:
            state = read_state(path)
        except InputError as error:
            unreadable.append(f"{path.name}: {error}")
            continue
        score = "-" if state["score"] is None else f"{state['score']:.4f}"
        note = f"saved after {state['skips_in_a_row']} non-finite steps in a row" if state["skips_in_a_row"] else ""
        rows.append((path.name, f"{state['tokens_seen']:,}", f"{size / 1e6:.1f} MB", score, note))
    print(format_table(("checkpoint", "tokens seen", "size", "validation", ""), rows))
    for text in unreadable:
        print(text)
    for path in list_set_aside(run):
        print(f"{path.name} is set aside; delete that folder when you no longer need it")


def verify(run: Path) -> int:
    """Compare every file with the manifest; exit with status 1 where a checkpoint is damaged.

    Args:
        run: A run folder.
    """
    from moe_gpt.errors import InputError
    from moe_gpt.training.saving.listing import verify_checkpoint

    status = 0
    for path in find_checkpoints(run):
        try:
            verify_checkpoint(path)
            print(f"{path.name}: every file is as it was saved")
        except (InputError, OSError) as error:
            print(f"{path.name}: DAMAGED: {error}")
            status = 1
    return status


def merge(checkpoint: Path) -> None:
    """Turn the shards of several ranks into the files that one process would have written, in place.

    Args:
        checkpoint: A checkpoint, or a run folder for its newest one.
    """
    from moe_gpt.training.saving.manifest import FILES, WEIGHTS, files_of
    from moe_gpt.training.saving.run_folder import hold
    from moe_gpt.training.saving.saved_model import verified
    from moe_gpt.training.saving.write import merge_shards

    path = verified(checkpoint, FILES)
    shards = files_of(path, (WEIGHTS,))
    if shards == [WEIGHTS]:
        print(f"{path} has no shards; nothing to do")
        return
    is_of_run = path.absolute().parent.name == "checkpoints"
    with hold(path.absolute().parents[1], _WAIT) if is_of_run else contextlib.nullcontext():
        merge_shards(path)
    print(f"{path}: {len(shards)} shards are one file now")


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Which checkpoints are kept."""

    keep_last: Whole | None = None
    """Number of newest checkpoints to keep; the run's config has the default."""
    keep_every_steps: WholeOrZero | None = None
    """Also keep checkpoints whose step is a multiple of this; 0 adds none. The run's config has the default."""
    dry_run: Switch = False
    """Print what would be deleted, and delete nothing."""


def prune(run: Path, *, options: PruneOptions = PruneOptions()) -> None:
    """Delete the checkpoints that the run's settings, or the options given here, do not keep.

    Args:
        run: A run folder.
    """
    from moe_gpt.training.saving import store
    from moe_gpt.training.saving.checkpoint import read_config
    from moe_gpt.training.saving.run_folder import hold

    checkpoints = find_checkpoints(run)
    given: dict[str, Any] = {"keep_last": options.keep_last, "keep_every_steps": options.keep_every_steps}
    config = read_config(checkpoints[-1]).checkpoint
    config = dataclasses.replace(config, **{key: value for key, value in given.items() if value is not None})
    if options.dry_run:
        gone, verb = store.prunable_checkpoints(run, config), "would delete"
    else:
        with hold(run, _WAIT):
            gone, verb = store.prune(run, config), "deleted"
    for path in gone:
        print(f"{verb} {path}")
    print(f"{len(checkpoints) - len(gone)} kept")
