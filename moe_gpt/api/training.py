"""Training from Python, as ``moe-gpt train`` does it, and with your own router, schedule and callbacks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_gpt.config import RunConfig
from moe_gpt.config.section import Count, Positive, require
from moe_gpt.config.yaml import find_config, load_run_config
from moe_gpt.errors import InputError
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.ops.device import pick_device
from moe_gpt.post_training.stages import stage_of
from moe_gpt.training.callbacks import Callback, check_callbacks
from moe_gpt.training.display import Display, Silent, TerminalDisplay
from moe_gpt.training.loop import Limits, Outcome
from moe_gpt.training.loop import train as train_run
from moe_gpt.training.saving.run_folder import open_run_folder
from moe_gpt.training.saving.store import prune
from moe_gpt.training.schedule import StepSchedule, tokens_after
from moe_gpt.training.setup import OwnParts, Run, set_up_run
from moe_gpt.training.summary import note_on_schedule


def train(
    config: str | Path | RunConfig,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    init_from: str | Path | None = None,
    allow_changes: Collection[str] = (),
    max_steps: int | None = None,
    max_minutes: float | None = None,
    fit_schedule: bool = False,
    device: str = "auto",
    make_router: MakeRouter = Router,
    schedule: StepSchedule | None = None,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] = print,
) -> Run:
    """Train a model and return the run: ``run.state.model`` is trained, and ``run.run_dir`` holds the records.

    Args:
        config: a YAML file, the name of one that comes with moe_gpt (``"tiny.yaml"``), or a ``RunConfig``.
        overrides: settings over the file's, as ``{"model.n_layers": 2}`` or ``["model.n_layers=2"]``.
        run_dir: folder of the run; ``runs/<name of the config>`` by default.
        resume: continue from the run's newest checkpoint; if there is none, start a new run.
        init_from: a run, a checkpoint or a Hugging Face folder whose weights a new run starts with.
        allow_changes: with ``resume``, settings that may differ from those of the run.
        max_steps: stop after this optimizer step of the run; the learning rate still follows the whole schedule.
        max_minutes: stop after this many minutes.
        fit_schedule: shrink the schedule to ``max_steps``, so that the learning rate decays within them.
        device: auto, cpu, cuda or mps.
        make_router: makes each layer's router; its name and source are recorded, and loading asks for it again.
        schedule: plans each step instead of the config's stages: an object with ``at(tokens_seen)``, which returns a
            ``moe_gpt.StepPlan``, and optionally ``total_tokens``, the length of the run.
        callbacks: called after steps, evaluations and saves and at the end; see ``Callback``.
        say: called with each message before training starts.

    Raises:
        InputError: for bad settings and folders, with a line for each problem.
        TrainingStopped: where training cannot continue; the message names the newest checkpoint.
    """
    require(Count | None, max_steps=max_steps)
    require(Positive | None, max_minutes=max_minutes)
    check_callbacks(callbacks)
    if fit_schedule and schedule is not None:
        raise InputError("fit_schedule shrinks the schedule of the config, and cannot shrink a schedule of your own")
    own, fit_steps = OwnParts(make_router, schedule), fit_budget(fit_schedule, max_steps)
    run = prepare(config, overrides, run_dir, resume, init_from, allow_changes, fit_steps, device, own, say)
    say_about_limits(run, limits := Limits(max_steps, max_minutes), say)
    train_to_the_end(run, limits, callbacks)
    return run


def say_about_limits(run: Run, limits: Limits, say: Callable[[str], None]) -> None:
    """Say what a limit means for the learning rate, if it ends the run early."""
    if note := note_on_schedule(run, limits):
        say(note)


def prepare(
    config: str | Path | RunConfig,
    overrides: Mapping[str, Any] | Sequence[str],
    run_dir: str | Path | None,
    resume: bool,
    init_from: str | Path | None,
    allow_changes: Collection[str],
    fit_steps: int | None,
    device: str,
    own: OwnParts,
    say: Callable[[str], None],
) -> Run:
    """Return a run that can start; arguments and errors are those of ``train`` and ``set_up_run``."""
    if allow_changes and not resume:
        raise InputError(f"--allow-changes needs --resume, got {','.join(allow_changes)} without it")
    if isinstance(config, RunConfig):
        if overrides or run_dir is None:
            raise InputError("a RunConfig needs a run_dir, and takes no overrides (use dataclasses.replace)")
        settings = config
    else:
        settings = load_run_config(config, as_overrides(overrides))
        run_dir = run_dir or Path("runs") / find_config(str(config)).stem
    start = str(init_from) if init_from else None
    chosen = pick_device(device)
    stage = stage_of(settings)
    return set_up_run(settings, Path(run_dir), chosen, resume, start, allow_changes, say, own, fit_steps, stage)


def fit_budget(fit_schedule: bool, max_steps: int | None) -> int | None:
    """Return the steps that the schedule is shrunk to; None if the schedule is not shrunk.

    Raises:
        InputError: for ``fit_schedule`` without ``max_steps``.
    """
    if fit_schedule and max_steps is None:
        raise InputError("--fit-schedule needs --max-steps: the number of steps that the schedule shrinks to")
    return max_steps if fit_schedule else None


def as_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> Sequence[str]:
    """Return settings in the form of the command line, ``key.path=value``."""
    if isinstance(overrides, str):
        raise InputError(f"overrides must be a mapping or a list of key.path=value, got {overrides!r}")
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return overrides


def train_to_the_end(run: Run, limits: Limits, callbacks: Sequence[Callback] = ()) -> tuple[Outcome, Display]:
    """Train a prepared run while locking its folder; return the reason of its end, and its display.

    A finished run is not trained.
    """
    remaining = None if limits.max_steps is None else max(0, limits.max_steps - run.state.step)
    seen, total = run.state.tokens_seen, run.schedule.total_tokens
    end = total if remaining is None else min(total, tokens_after(run.schedule, remaining, seen))
    with contextlib.ExitStack() as stack:
        folder = open_run_folder(run.run_dir, run.identity, run.resumed_from, run.damaged)
        run.team.from_main(lambda: stack.enter_context(folder))
        is_main = run.team.is_main
        display = TerminalDisplay(end, seen, limits.max_minutes) if is_main else Silent()
        stack.callback(display.close)
        if run.is_finished:
            # a process that was killed at the end has not done it
            run.team.from_main(lambda: prune(run.run_dir, run.config.checkpoint))
            return "finished", display
        return train_run(run, limits, display, callbacks=callbacks), display
