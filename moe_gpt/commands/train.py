"""``moe-gpt train``: train a mixture-of-experts decoder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from moe_gpt.commands.next_command import command_line, repeated
from moe_gpt.commands.options import AboveZero, Device, Switch, Whole, Words, flat
from moe_gpt.commands.output import lasting_output
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.model.transformer import MoEGPT
    from moe_gpt.training.setup import Run

EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
_SECONDS_FOR_RANK_0 = 3
START, LIMITS, OWN = (
    Group.create_ordered(name) for name in ("Starting and resuming", "When to stop", "Router and device")
)


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Start, limits, router and device of a run."""

    run_dir: Annotated[Path | None, Parameter(group=START)] = None
    """Folder of the run; runs/ and the name of the config by default."""
    resume: Annotated[Switch, Parameter(group=START)] = False
    """Continue from the newest checkpoint; if there is none, start a new run."""
    init_from: Annotated[str | None, Parameter(group=START)] = None
    """Start a new run with the weights of a run, a checkpoint or a Hugging Face folder. A mixture of experts can also
    start with the weights of a dense model. With --resume, a run that has a checkpoint ignores this option."""
    allow_changes: Annotated[Words, Parameter(group=START)] = ()
    """With --resume: allow these changes since the checkpoint, as KEY,KEY. A KEY is a setting (optimizer.lr), a section
    (optimizer), or one of data.SOURCE, router, schedule, code, torch, moe_gpt. Later checkpoints record the changes."""
    max_steps: Annotated[Whole | None, Parameter(group=LIMITS)] = None
    """Stop after this optimizer step of the run."""
    max_minutes: Annotated[AboveZero | None, Parameter(group=LIMITS)] = None
    """Stop after this many minutes."""
    fit_schedule: Annotated[Switch, Parameter(group=LIMITS)] = False
    """Shrink the schedule to --max-steps, so that all stages and the decay of the learning rate happen within these
    steps. Without --fit-schedule, --max-steps cuts the schedule off."""
    router: Annotated[str | None, Parameter(group=OWN)] = None
    """A router of your own, as FILE.py:NAME. The checkpoint records its name and source."""
    device: Annotated[Device, Parameter(group=OWN)] = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, mps."""


NO_OPTIONS = TrainOptions()


def train(config: str, *overrides: str, options: TrainOptions = NO_OPTIONS) -> int:
    """Train a mixture-of-experts decoder, save it, and print scores and samples.

    Args:
        config: A YAML file, or the name of a config that comes with moe_gpt, such as tiny.yaml.
        overrides: Settings that replace those of the file, as key.path=value.
    """
    return run_command("train", config, overrides, options)


def run_command(command: str, config: str, overrides: Sequence[str], options: TrainOptions) -> int:
    """Run ``train`` or ``finetune`` on one rank; return the exit status."""
    from moe_gpt.distributed.process import is_another_rank, leave, should_tell

    if not is_another_rank():
        with lasting_output():
            status = _train_or_tell(command, config, overrides, options)
    else:  # rank 0 says the same
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                status = _train(command, config, overrides, options)
            except InputError as error:
                if should_tell(error):
                    raise
                status = 2
        if status:  # torchrun ends all ranks when the first one fails, and rank 0 has something to say
            time.sleep(_SECONDS_FOR_RANK_0)
    if not status:
        leave()
    return status


def _train_or_tell(command: str, config: str, overrides: Sequence[str], options: TrainOptions) -> int:
    """Train; where Ctrl-C ends it outside of the steps, or a second time, say how to go on."""
    try:
        return _train(command, config, overrides, options)
    except KeyboardInterrupt:
        print(f"interrupted; continue with:\n  {repeated(command, '--resume')}", file=sys.stderr)
        return EXIT_STATUS["SIGINT"]


def _train(command: str, config: str, overrides: Sequence[str], options: TrainOptions) -> int:
    from moe_gpt.api.training import fit_budget, prepare, train_to_the_end
    from moe_gpt.commands.finetune import check_command, score_after, score_before
    from moe_gpt.model.router import Router
    from moe_gpt.training.loop import Limits
    from moe_gpt.training.recovery import RankStopped, TrainingStopped
    from moe_gpt.training.saving.own_code import find_router
    from moe_gpt.training.setup import OwnParts
    from moe_gpt.training.summary import describe_run, note_on_schedule

    limits = Limits(options.max_steps, options.max_minutes)
    check_command(command, config, overrides)
    run = prepare(
        config,
        overrides,
        options.run_dir,
        options.resume,
        options.init_from,
        [key.strip() for words in options.allow_changes for key in words.split(",") if key.strip()],
        fit_budget(options.fit_schedule, options.max_steps),
        options.device,
        OwnParts(find_router(options.router) if options.router else Router),
        say=lambda text: print(wrap(text), flush=True),
    )
    print(wrap(describe_run(run), " " * 11), flush=True)
    if note := note_on_schedule(run, limits):
        print(wrap(note, " " * 11), flush=True)
    was_finished = run.is_finished
    score_before(run)
    try:
        outcome, display = train_to_the_end(run, limits)
    except TrainingStopped as stopped:
        _tell(run, f"error: {stopped}", by_all=isinstance(stopped, RankStopped))
        return 3
    if was_finished:
        score_after(run, run.whole_model())
        print(f"this run is finished; next:\n  {next_commands(run, options.router)[0]}")
        return 0
    if outcome in EXIT_STATUS:
        _tell(run, f"{outcome}: saved step {run.state.step}; continue with:\n  {repeated(command, '--resume')}")
        return EXIT_STATUS[outcome]
    model = run.whole_model()
    if model:
        print(display.summary())
        score_after(run, model)
        say_what_came_out(run, outcome, model, options.router)
    return 0


def _tell(run: Run, text: str, by_all: bool = False) -> None:
    if run.team.is_main or by_all:
        print(text, file=sys.stderr)


def say_what_came_out(run: Run, outcome: str, model: MoEGPT, router: str | None) -> None:
    """Print samples and the reason of a stop, write the report, and print the next commands."""
    from moe_gpt.report.routed_text import show_controls
    from moe_gpt.training.records.samples import generate_samples
    from moe_gpt.training.saving.saved_model import resolve_checkpoint

    for name, text in () if run.config.stage else generate_samples(run, 120, model):
        shown = "\t".join(map(show_controls, text.split("\t")))  # an untrained model writes terminal codes too
        print(f"--- {name} ---\n{shown}\n")
    if run.resumed_from == resolve_checkpoint(run.run_dir):
        print(f"the run is already at step {run.state.step}; nothing was trained")
    elif outcome != "finished":
        print(wrap(f"stopped by {outcome} at step {run.state.step}; to continue, add --resume and a later limit"))
    if run.config.train.report:
        write_page(run.run_dir)
    print("next:", *next_commands(run, router), sep="\n  ")


def next_commands(run: Run, router: str | None) -> list[str]:
    """Return commands that use a run."""
    from moe_gpt.commands.finetune import next_after_stage

    if run.config.stage:
        return next_after_stage(run)
    files = [] if run.config.data.validation_fraction else ["--files", "FILE"]
    return [generate_command(run, router), command_line("evaluate", run.run_dir, *files, *_router(router))]


def _router(router: str | None) -> list[str]:
    return ["--router", router] if router else []


def generate_command(run: Run, router: str | None) -> str:
    """Return a command that continues a prompt of the run's last source, with the router of its own if it has one."""
    prompt = run.config.data.sources[-1].prompt
    words = [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    return command_line("generate", run.run_dir, *words, *_router(router))


def write_page(run_dir: Path) -> None:
    """Write the run's report; an error here is a warning, because the run is saved."""
    from moe_gpt.report.report import write_report
    from moe_gpt.report.run_records import read_run

    path = run_dir / "report.html"
    try:
        write_report([read_run(run_dir)], path)
    except Exception as error:
        print(
            f"warning: no report ({type(error).__name__}: {error}); try again with:\n  "
            + command_line("report", run_dir),
            file=sys.stderr,
        )
    else:
        print(f"report: {path}")
