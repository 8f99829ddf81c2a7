"""Train a mixture-of-experts decoder: python scripts/train.py --config tiny.yaml."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe_gpt.commands.cli import (
    ArgumentParser,
    command_line,
    count_argument,
    describe_settings,
    positive_argument,
)
from moe_gpt.config.yaml import find_config, load_run_config
from moe_gpt.errors import InputError

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 done or stopped by a limit, 2 bad input, 3 training could not go on (the message says "
        "why and what is saved), 129, 130 or 143 saved and stopped by SIGHUP, SIGINT or SIGTERM\n\n"
        "keys of a config, for the YAML file and for key.path=value:\n" + "\n".join(describe_settings()),
    )
    parser.add_argument("--config", required=True, help="path of a YAML file, or a name in configs/")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<config name>")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, or start")
    parser.add_argument(
        "--init-from",
        metavar="MODEL",
        help="start a new run with the weights of a run, a checkpoint or a Hugging Face folder; those of a dense model "
        "can start a mixture of experts (with --resume: unless the run has started)",
    )
    parser.add_argument(
        "--allow-changes",
        metavar="KEY,KEY",
        type=lambda text: [key.strip() for key in text.split(",") if key.strip()],
        action="extend",
        default=[],
        help="with --resume: go on although these are not what they were (a setting or a section such as optimizer, "
        "data.<source>, code, torch, moe_gpt); the checkpoint records it",
    )
    parser.add_argument("--max-steps", type=count_argument, help="stop after this optimizer step of the run")
    parser.add_argument("--max-minutes", type=positive_argument, help="stop after this time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings over the file's")
    return parser.parse_intermixed_args()


def main() -> int:
    """Train, then say what came out and what to do next."""
    arguments = parse_arguments()
    config = load_run_config(arguments.config, arguments.overrides)
    run_dir = arguments.run_dir or Path("runs") / find_config(arguments.config).stem
    if arguments.allow_changes and not arguments.resume:
        raise InputError(f"--allow-changes is for --resume, got {','.join(arguments.allow_changes)} without it")

    from moe_gpt.ops.device import pick_device
    from moe_gpt.training.display import TerminalDisplay
    from moe_gpt.training.loop import Limits, train
    from moe_gpt.training.recovery import TrainingStopped
    from moe_gpt.training.saving.run_folder import open_run_folder
    from moe_gpt.training.saving.store import prune
    from moe_gpt.training.setup import set_up_run
    from moe_gpt.training.summary import describe_run

    run = set_up_run(
        config, run_dir, pick_device(arguments.device), arguments.resume, arguments.init_from, arguments.allow_changes
    )
    print(describe_run(run), flush=True)
    if run.is_finished:
        with open_run_folder(run_dir, run.identity, run.resumed_from, run.damaged):
            prune(run_dir, config.checkpoint)  # a process that was killed at the end has not done it
        print(f"this run is finished; next: {generate_command(run)}")
        return 0
    with (
        open_run_folder(run_dir, run.identity, run.resumed_from, run.damaged),
        contextlib.closing(TerminalDisplay(run.schedule.total_tokens, run.state.tokens_seen)) as display,
    ):
        try:
            outcome = train(run, Limits(arguments.max_steps, arguments.max_minutes), display)
        except TrainingStopped as stopped:
            print(f"error: {stopped}", file=sys.stderr)
            return 3
    if outcome in EXIT_STATUS:
        resume = command_line(*(word for word in sys.argv if word != "--resume"), "--resume")
        print(f"{outcome}: saved step {run.state.step}; continue with: {resume}", file=sys.stderr)
        return EXIT_STATUS[outcome]
    print(display.summary())
    say_what_came_out(run, outcome)
    return 0


def say_what_came_out(run: Run, outcome: str) -> None:
    """Print samples and where the run stands, write the report, and say what to do next."""
    from moe_gpt.training.records.samples import generate_samples
    from moe_gpt.training.saving.saved_model import resolve_checkpoint

    for name, text in generate_samples(run, n_tokens=120):
        print(f"--- {name} ---\n{text}\n")
    if run.resumed_from == resolve_checkpoint(run.run_dir):
        print(f"already at step {run.state.step}; nothing was trained")
    elif outcome != "finished":
        print(
            f"stopped by {outcome} at step {run.state.step}; to go on, repeat with --resume and a later limit, or none"
        )
    if run.config.train.report:
        report(run.run_dir)
    print(f"next: {generate_command(run)}\n      {command_line('scripts/evaluate.py', run.run_dir)}")


def generate_command(run: Run) -> str:
    """Return a command that continues a prompt of the run's last source."""
    return command_line("scripts/generate.py", run.run_dir, "--prompt", run.config.data.sources[-1].prompt)


def report(run_dir: Path) -> None:
    """Write the run's report; the run is saved, whatever goes wrong here."""
    from moe_gpt.report.report import write_report
    from moe_gpt.report.run_records import read_run

    path = run_dir / "report.html"
    try:
        write_report([read_run(run_dir)], path)
    except Exception as error:
        command = command_line("scripts/report.py", run_dir)
        print(f"warning: no report ({type(error).__name__}: {error}); try again with: {command}", file=sys.stderr)
    else:
        print(f"report: {path}")
