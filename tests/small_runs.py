"""Whole small runs in the tests' own process."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from moe_gpt.config import RunConfig
from moe_gpt.training.display import Silent
from moe_gpt.training.loop import Limits, train
from moe_gpt.training.records.metrics import read_metrics
from moe_gpt.training.saving.run_folder import open_run_folder
from moe_gpt.training.saving.saved_model import resolve_checkpoint
from moe_gpt.training.setup import Run, set_up_run
from moe_gpt.training.stage import PRETRAINING

CPU = torch.device("cpu")


def run_training(
    config: RunConfig,
    run_dir: Path,
    display=None,
    resume=False,
    init_from=None,
    allow_changes=(),
    take_step=None,
    callbacks=(),
    stage=PRETRAINING,
    **limits,
) -> tuple[Run, str]:
    """Train in a folder; return the run and how it ended."""
    run = set_up_run(config, run_dir, CPU, resume, init_from, allow_changes, say=lambda text: None, stage=stage)
    with open_run_folder(run_dir, run.identity, run.resumed_from, run.damaged):
        outcome = train(run, Limits(**limits), display or Silent(), take_step, callbacks)
    return run, outcome


_whole_runs: dict[str, tempfile.TemporaryDirectory] = {}


def whole_run(config: RunConfig) -> Path:
    """Return the folder of this run, trained once without a pause, for tests that only read it."""
    key = repr(config)
    if key not in _whole_runs:
        _whole_runs[key] = tempfile.TemporaryDirectory()
        assert run_training(config, Path(_whole_runs[key].name) / "run")[1] == "finished"
    return Path(_whole_runs[key].name) / "run"


def change(config: RunConfig, section: str, **settings) -> RunConfig:
    """Return the config with some settings of a section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **settings)})


class Listening(Silent):
    """A display that remembers what it was warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Remember it."""
        self.warnings.append(text)


def events(run_dir: Path) -> list[dict]:
    """Return the lines of events.jsonl."""
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[dict]:
    """Return the lines of single steps."""
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def weights_and_state(run_dir: Path) -> bytes:
    """Return the weights and the optimizer's state of the newest checkpoint."""
    folder = resolve_checkpoint(run_dir)
    return (folder / "model.safetensors").read_bytes() + (folder / "optimizer.safetensors").read_bytes()
