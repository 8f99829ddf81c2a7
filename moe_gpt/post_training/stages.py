"""The stage of a run, by the section of its config, and what its model scores, answers and routes.

Scores, answers and experts are of the same held-out prompts before and after the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from moe_gpt.config import RunConfig
from moe_gpt.files.durable import replace_file
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import autocast
from moe_gpt.post_training.preferring import DPO, REWARD, pair_answers, pair_rows, score_pairs
from moe_gpt.post_training.reinforcing import RL, line_answers, line_rows, score_lines
from moe_gpt.post_training.rollout import left_padded
from moe_gpt.post_training.scores import (
    conversation_answers,
    conversation_rows,
    score_conversations,
    what_is_not_scored,
    write_scores,
)
from moe_gpt.post_training.seeing_scores import picture_answers, picture_rows, score_pictures, write_looks
from moe_gpt.post_training.sft import SFT
from moe_gpt.post_training.showing import SEE
from moe_gpt.training.adapters import merged
from moe_gpt.training.setup import Run
from moe_gpt.training.stage import PRETRAINING, Stage

_STAGES = {None: PRETRAINING, "sft": SFT, "reward": REWARD, "dpo": DPO, "rl": RL, "see": SEE}
_SCORES: dict[str, Callable[[Run, MoEGPT], Mapping[str, Any]]] = {
    "sft": score_conversations,
    "reward": score_pairs,
    "dpo": score_pairs,
    "rl": score_lines,
    "see": score_pictures,
}
_ANSWERS = {
    "sft": conversation_answers,
    "reward": pair_answers,
    "dpo": pair_answers,
    "rl": line_answers,
    "see": picture_answers,
}
_ROWS = {"sft": conversation_rows, "reward": pair_rows, "dpo": pair_rows, "rl": line_rows, "see": picture_rows}
_N_ANSWERS, _N_ROWS = 8, 64
"""Prompts whose answers are kept, and rows whose experts are."""


def stage_of(config: RunConfig) -> Stage:
    """Return the stage of a config; pre-training where it has no section of a later one."""
    return _STAGES[config.stage]


def examine(run: Run, model: MoEGPT) -> Mapping[str, Any]:
    """Return the scores of a run's model in the tasks of its stage; none for pre-training."""
    return _SCORES[run.config.stage](run, model) if run.config.stage else {}


def note_on_scores(run: Run, found: Mapping[str, Any]) -> str:
    """Return what the scores of a stage are not about, and why; empty where there is nothing to say."""
    if run.config.sft:
        return what_is_not_scored(run.config.sft.sources, found)
    name = run.material.names[0]
    return "" if found else f"note: no scores, because none of the {name} is held out; there are few of them"


def answers_to_fixed_prompts(run: Run, model: MoEGPT) -> list[dict[str, Any]]:
    """Return what a run's model makes of eight held-out prompts; none where a stage learns from conversations of files.

    Each has the texts ``prompt`` and ``answer``, and ``expected``, the right answer, where there is one. Pairs have
    ``chosen`` and ``rejected``, and the ``answer`` of a reward model is its scores of the two. Conversations have
    ``task``, the built-in set, and ``turn``, from 1.
    """
    return _ANSWERS[str(run.config.stage)](run, model, _N_ANSWERS)


def write_findings(run: Run, model: MoEGPT, time: str, **more: Any) -> dict[str, Any]:
    """Write what a run's model scores, answers and routes ``before`` or ``after`` its stage; return all scores."""
    model = merged(model)
    write_routing(run, model, time)
    if run.config.see:
        write_looks(run, model)
    found = {time: examine(run, model), f"answers_{time}": answers_to_fixed_prompts(run, model)}
    return write_scores(run.run_dir, run.config.stage, {**found, **more})


@torch.no_grad()
def write_routing(run: Run, model: MoEGPT, time: str) -> None:
    """Write the tokens (1, N) of fixed held-out prompts and answers, and their experts (L, 1, N, K), best first.

    Nothing is written for a dense model, or where no prompt is held out. The answers do not depend on the stage.
    """
    rows = _ROWS[str(run.config.stage)](run, _N_ROWS)
    if model.config.is_dense or not rows:
        return
    tokens, valid = (part.to(run.device) for part in left_padded(rows))
    with evaluating(model), autocast(run.device, run.precision):
        routings = model.hidden_states(tokens, valid)[1]
    choices = np.stack([routing.expert_indices[valid.flatten()].cpu().numpy() for routing in routings])
    arrays: dict[str, np.ndarray] = {
        "tokens": np.asarray(tokens[valid].cpu().numpy()[None], np.int32),
        "choices": np.asarray(choices[:, None], np.uint16),
    }
    replace_file(routing_file(run.run_dir, time), save(arrays))


def routing_file(run_dir: Path, time: str) -> Path:
    """Return the file with the experts ``before`` or ``after`` a stage."""
    return run_dir / f"routing_{time}.safetensors"
