"""Look after a run's checkpoints: python scripts/checkpoint.py list|verify|prune runs/tiny."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from moe_gpt.commands.cli import ArgumentParser, count_argument


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="exit status: 0, 1 where verify finds a damaged checkpoint, 2 bad input",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "show each checkpoint's step, tokens, size and validation loss"),
        ("verify", "compare every file with the manifest"),
        ("prune", "delete what the run's own settings, or those given here, do not keep"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", metavar="RUN", type=Path, help="a run folder")
        if name == "prune":
            command.add_argument("--keep-last", type=count_argument, help="newest to keep (default: the run's)")
            command.add_argument("--keep-every-steps", type=_steps, help="keep multiples, 0 none (default: the run's)")
            command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    return parser.parse_args()


def _steps(text: str) -> int:
    return 0 if text == "0" else count_argument(text)


def main() -> int:
    """Do what the first argument says."""
    arguments = parse_arguments()

    from moe_gpt.training.saving.checkpoint import list_checkpoints

    checkpoints = list_checkpoints(arguments.run)
    if not checkpoints:
        raise FileNotFoundError(f"no checkpoints in {arguments.run}; give a run folder such as runs/tiny")
    if arguments.command == "list":
        show(checkpoints)
    elif arguments.command == "verify":
        return verify(checkpoints)
    else:
        prune_run(arguments, checkpoints)
    return 0


def show(checkpoints: list[Path]) -> None:
    """Print a table; the files' contents are not checked."""
    from moe_gpt.errors import InputError
    from moe_gpt.terminal.tables import format_table
    from moe_gpt.training.saving.checkpoint import read_state
    from moe_gpt.training.saving.store import list_set_aside

    rows, unreadable = [], []
    for path in checkpoints:
        size = sum(file.stat().st_size for file in path.iterdir())
        try:
            state = read_state(path)
        except InputError as error:
            unreadable.append(f"{path.name}: {error}")
            continue
        score = "-" if state["score"] is None else f"{state['score']:.4f}"
        note = f"within {state['skips_in_a_row']} non-finite steps" if state["skips_in_a_row"] else ""
        rows.append((path.name, f"{state['tokens_seen']:,}", f"{size / 1e6:.1f} MB", score, note))
    print(format_table(("checkpoint", "tokens seen", "size", "validation", ""), rows))
    for text in unreadable:
        print(text)
    for path in list_set_aside(checkpoints[0].parent.parent):
        print(f"{path.name} is set aside; delete it when nobody wants to look at it")


def verify(checkpoints: list[Path]) -> int:
    """Print a line for each checkpoint; return 1 where one is damaged."""
    from moe_gpt.errors import InputError
    from moe_gpt.training.saving.checkpoint import verify_checkpoint

    status = 0
    for path in checkpoints:
        try:
            verify_checkpoint(path)
            print(f"{path.name}: every file is what was saved")
        except (InputError, OSError) as error:
            print(f"{path.name}: DAMAGED: {error}")
            status = 1
    return status


def prune_run(arguments: argparse.Namespace, checkpoints: list[Path]) -> None:
    """Delete what is not to be kept, and say what went."""
    from moe_gpt.training.saving.checkpoint import read_config
    from moe_gpt.training.saving.run_folder import hold
    from moe_gpt.training.saving.store import prunable_checkpoints, prune

    config = read_config(checkpoints[-1]).checkpoint
    given = {"keep_last": arguments.keep_last, "keep_every_steps": arguments.keep_every_steps}
    config = dataclasses.replace(config, **{key: value for key, value in given.items() if value is not None})
    if arguments.dry_run:
        gone, verb = prunable_checkpoints(arguments.run, config), "would delete"
    else:
        with hold(arguments.run):
            gone, verb = prune(arguments.run, config), "deleted"
    for path in gone:
        print(f"{verb} {path}")
    print(f"{len(checkpoints) - len(gone)} kept")
