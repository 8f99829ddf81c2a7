"""Training the runs of a study in this process, and their states."""

from __future__ import annotations

import pytest
import torch

from moe_gpt.studies import worker
from moe_gpt.studies.plan import Study
from moe_gpt.studies.results import look


def train_here(study: Study, rerun: tuple[str, ...] = (), reverse: bool = False) -> list[str]:
    """Train the runs of a study as workers do, but in this process; return their states in the study's order."""
    n_threads, told = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "say_into", lambda descriptor: None)
        for run in reversed(study.runs) if reverse else study.runs:
            told[run.name] = worker.work(run, rerun)
    torch.set_num_threads(n_threads)
    return [told[run.name] for run in study.runs]


def states(study: Study) -> dict[str, str]:
    """Return the state of each run."""
    return {row.run.name: row.state for row in look(study)}
