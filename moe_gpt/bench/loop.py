"""What a training run does besides its steps: the time until the first, and the price of everything around them."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_gpt.bench.processes import measure
from moe_gpt.config import RunConfig
from moe_gpt.data.prepare import prepare_data

_PARTS = {
    "reading data": [("stream", "batch"), ("step", "split_batch")],
    "recording in steps": [
        ("recording", "observe_routing"),
        ("norms", "gradient_norms"),
        ("norms", "parameter_norms"),
        ("norms", "update_norms"),
        ("recording", "describe_routing"),
        ("recording", "describe_norms"),
    ],
    "recording at evaluations": [("recording", "write_evaluation")],
    "samples at evaluations": [("diary", "sample")],
    "scoring at evaluations": [("evaluation", "examine")],
    "metrics, display, health": [("loop", "fetch_metrics")],
    "waiting for saves": [("loop", "save")],
    "training steps": [("step", "train_step")],
}
"""Functions by file and name whose time is that part's; they do not call each other within a part."""


class Profile(NamedTuple):
    """Of one run, in its own process."""

    first_step_at: float
    """``time.time()`` when the first step had ended."""
    seconds: dict[str, float]
    """Time of each of ``_PARTS``, and of ``train``: the whole loop."""


def bench_loop(config: RunConfig, n_steps: int, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train for some steps with Python's profiler on; say where the time goes.

    The profiler makes calls of Python functions dearer, so that what is not a training step is rather overstated.

    Args:
        config: of the run; its data is prepared beforehand.
        n_steps: optimizer steps.
        folder: for the run.
        say: told each result.
    """
    prepare_data(config.data, say=lambda text: None)
    started_at = time.time()
    profile: Profile = measure(_profile, config, n_steps, folder).value
    start, whole = profile.first_step_at - started_at, profile.seconds.pop("train")
    say(f"{start:.1f} s from starting Python to the end of the first step, data prepared")
    say(f"{n_steps} steps and what is around them took {whole:.1f} s, of that:")
    for part, seconds in profile.seconds.items():
        say(f"  {part:<26}{seconds:>8.2f} s{seconds / whole:>9.2%}")
    return [
        {"name": "loop/first step", "seconds": start},
        *({"name": f"loop/{part}", "fraction": seconds / whole} for part, seconds in profile.seconds.items()),
    ]


def _profile(config: RunConfig, n_steps: int, folder: Path) -> Profile:
    from moe_gpt.training import loop
    from moe_gpt.training.saving.run_folder import open_run_folder
    from moe_gpt.training.setup import set_up_run

    first_step_at = 0.0

    class Silent:
        def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
            pass

        def scores(self, step: int, scores: dict) -> None:
            pass

        def warn(self, text: str) -> None:
            pass

    def train_step(*arguments: Any) -> Any:
        nonlocal first_step_at
        result = real(*arguments)
        first_step_at = first_step_at or time.time()
        return result

    real, loop.train_step = loop.train_step, train_step  # type: ignore[assignment]
    run = set_up_run(config, folder, torch.device("cpu"), say=lambda text: None)
    profiler = cProfile.Profile()
    with open_run_folder(folder, run.facts, run.resumed_from, run.damaged), profiler:
        loop.train(run, loop.Limits(max_steps=n_steps), Silent())
    times: dict[tuple[str, str], float] = {}
    for (file, _, name), (_, _, _, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        if "moe_gpt" in file:
            key = (Path(file).stem, name)
            times[key] = max(times.get(key, 0.0), cumulative)
    seconds = {part: sum(times.get(key, 0.0) for key in keys) for part, keys in _PARTS.items()}
    seconds["training steps"] -= sum(
        times.get(("norms", name), 0.0) for name in ("gradient_norms", "parameter_norms", "update_norms")
    )
    return Profile(first_step_at, {**seconds, "train": times["loop", "train"]})
