"""The arrays of an evaluation, for reports: ``evaluations/step_XXXXXXXX.safetensors``.

They depend on one step and on fixed text only, so an interrupted and resumed run writes the same files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from moe_gpt.files.durable import delete_leftovers, replace_file
from moe_gpt.measure.health import Gradients
from moe_gpt.measure.observation import choices_on, mean_gradients
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import Precision
from moe_gpt.training.evaluation import SourceEvaluation

EVALUATIONS = "evaluations"


def write_evaluation(
    run_dir: Path,
    step: int,
    model: MoEGPT,
    evaluations: dict[str, SourceEvaluation],
    slices: dict[str, np.ndarray],
    precision: Precision,
    end_of_text_id: int | None = None,
) -> Gradients | None:
    """Write the arrays of an evaluation, and return its gradients. The same state gives the same bytes.

    For each source: ``<source>/nats`` and ``/counts`` by position (T,), ``/tokens_per_expert`` (L, E) over all held-out
    tokens, and of its slice ``/tokens`` (B, T) and ``/choices`` (L, B, T, K). ``gradients/routers`` and
    ``gradients/experts`` (L,) are those of cross entropy alone, on the first tokens of all slices.

    Args:
        step: completed optimizer steps.
        model: its state after that step.
        slices: tokens of each source whose experts are recorded; empty for none.
        end_of_text_id: if given, attention stays within documents.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, found in evaluations.items():
        arrays |= {f"{name}/nats": found.nats, f"{name}/counts": found.counts}
        if found.tokens_per_expert is not None:
            arrays[f"{name}/tokens_per_expert"] = found.tokens_per_expert
    for name, tokens in slices.items():
        arrays[f"{name}/tokens"] = tokens.astype(np.int32)
        arrays[f"{name}/choices"] = choices_on(model, tokens, precision, end_of_text_id)
    gradients = mean_gradients(model, slices, precision, end_of_text_id)
    if gradients is not None:
        arrays |= {"gradients/routers": gradients.routers, "gradients/experts": gradients.experts}
    contents = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    replace_file(evaluation_file(run_dir, step), contents)
    return gradients


def evaluation_file(run_dir: Path, step: int) -> Path:
    """Return the file with the arrays of the evaluation after a step."""
    return run_dir / EVALUATIONS / f"step_{step:08d}.safetensors"


def remove_later_evaluations(run_dir: Path, step: int) -> None:
    """Remove the arrays of evaluations after a step, which will be made again, and leftovers of a killed process."""
    delete_leftovers(run_dir / EVALUATIONS, "step_")
    for path in (run_dir / EVALUATIONS).glob("step_*.safetensors"):
        if path > evaluation_file(run_dir, step):
            path.unlink()
