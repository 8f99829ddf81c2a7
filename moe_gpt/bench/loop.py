"""What a training run does besides its steps: the time until the first, and the price of everything around them."""

from __future__ import annotations

import cProfile
import inspect
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_gpt.bench.processes import measure
from moe_gpt.config import RunConfig
from moe_gpt.data.batches import split_batch
from moe_gpt.data.prepare import prepare_data
from moe_gpt.data.stream import TrainingStream
from moe_gpt.measure.observation import observe_routing
from moe_gpt.training.display import Silent
from moe_gpt.training.evaluation import Evaluator
from moe_gpt.training.loop import Limits, pretraining_step, train
from moe_gpt.training.records import norms
from moe_gpt.training.records.lines import describe_norms, describe_routing
from moe_gpt.training.records.run_log import RunLog
from moe_gpt.training.recovery import Recovery
from moe_gpt.training.saving.run_folder import open_run_folder
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.setup import Run, set_up_run
from moe_gpt.training.step import StepResult, train_step

_PARTS: dict[str, list[Callable]] = {
    "reading data": [TrainingStream.batch, split_batch],
    "recording in steps": [
        observe_routing, norms.gradient_norms, norms.parameter_norms, norms.update_norms, describe_routing,
        describe_norms,
    ],
    "recording at evaluations": [RunLog.keep_arrays],
    "samples at evaluations": [RunLog.sample],
    "scoring at evaluations": [Evaluator.evaluate],
    "metrics, display, health": [RunLog.fetch, RunLog.show_and_track],
    "waiting for saves": [Recovery.save],
    "training steps": [train_step],
}  # fmt: skip
"""Functions whose time is that part's; they do not call each other within a part."""
_IN_STEPS: list[Callable] = [norms.gradient_norms, norms.parameter_norms, norms.update_norms]
"""What is counted apart, though ``train_step`` calls it."""


class Profile(NamedTuple):
    """Of one run, in its own process."""

    first_step_at: float
    """``time.time()`` when the first step had ended."""
    seconds: dict[str, float]
    """Time of each of ``_PARTS``, and of ``train``: the whole loop."""


def bench_loop(config: RunConfig, n_steps: int, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train for some steps with Python's profiler on; say where the time goes.

    The profiler makes calls of Python functions dearer, so that what is not a training step is rather overstated. The
    data is prepared beforehand.
    """
    prepare_data(config.data, say=lambda text: None)
    started_at = time.time()
    profile: Profile = measure(_profile, config, n_steps, folder).value
    start, whole = profile.first_step_at - started_at, profile.seconds.pop("train")
    say(f"{start:.1f} s from starting Python to the end of the first step, data prepared")
    say(f"{n_steps} steps and the work around them took {whole:.1f} s, of which:")
    for part, seconds in profile.seconds.items():
        say(f"  {part:<26}{seconds:>8.2f} s{seconds / whole:>9.2%}")
    return [
        {"name": "loop/first step", "seconds": start},
        *({"name": f"loop/{part}", "fraction": seconds / whole} for part, seconds in profile.seconds.items()),
    ]


def _profile(config: RunConfig, n_steps: int, folder: Path) -> Profile:
    first_step_at = 0.0

    def take_step(run: Run, plan: StepPlan, should_record: bool) -> StepResult:
        nonlocal first_step_at
        result = pretraining_step(run, plan, should_record)
        first_step_at = first_step_at or time.time()
        return result

    run = set_up_run(config, folder, torch.device("cpu"), say=lambda text: None)
    profiler = cProfile.Profile()
    with open_run_folder(folder, run.identity, run.resumed_from, run.damaged), profiler:
        train(run, Limits(max_steps=n_steps), Silent(), take_step)
    times = {place: values[3] for place, values in pstats.Stats(profiler).stats.items()}  # type: ignore[attr-defined]

    def seconds_in(functions: list[Callable]) -> float:
        return sum(times.get(_place(function), 0.0) for function in functions)

    seconds = {part: seconds_in(functions) for part, functions in _PARTS.items()}
    seconds["training steps"] -= seconds_in(_IN_STEPS)
    return Profile(first_step_at, {**seconds, "train": seconds_in([train])})


def _place(function: Callable) -> tuple[str, int, str]:
    """Return how the profiler names a function: file, line, name; those of what decorators wrapped."""
    code = inspect.unwrap(function).__code__
    return code.co_filename, code.co_firstlineno, code.co_name
