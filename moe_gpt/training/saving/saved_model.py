"""Finding a run's newest checkpoint, and loading the model in it."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from moe_gpt.config import RunConfig
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.mistaken import other_weights, unfinished_download
from moe_gpt.files.tensors import TensorReader
from moe_gpt.interop.quantised_folder import is_quantised_folder
from moe_gpt.model.router import MakeRouter
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.adapters import let_learn
from moe_gpt.training.saving.checkpoint import (
    UPCYCLED,
    copy_weights,
    load_weights,
    read_config,
    read_state,
    read_tokenizer,
    read_weights,
)
from moe_gpt.training.saving.listing import (
    find_good_checkpoint,
    is_named_as_checkpoint,
    list_checkpoints,
    problem_of,
    verify_checkpoint,
)
from moe_gpt.training.saving.manifest import FILES_TO_USE_A_MODEL, MANIFEST, WEIGHTS
from moe_gpt.training.saving.own_code import router_for
from moe_gpt.training.saving.shards import ShardReader, open_tensors


class SavedModel(NamedTuple):
    """A verified checkpoint with all that using its model needs, except the weights, which are read later."""

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    step: int
    tokens_seen: int
    initialised_from: str | None
    router: dict[str, str] | None
    """Name and source digest of a user's router; None for ours."""
    trained_length: int | None
    """The longest sequence that the model was trained on; None where a user's own schedule chose it, or where
    pictures were shown to a finished text model."""

    @property
    def weights(self) -> TensorReader | ShardReader:
        """Reads the weights by our names."""
        return open_tensors(self.path, WEIGHTS)

    @property
    def run_dir(self) -> Path:
        """The run folder, if nobody has moved the checkpoint."""
        return self.path.parent.parent


class LoadedRun(NamedTuple):
    """A trained model with its tokenizer and config."""

    model: MoEGPT
    tokenizer: Tokenizer
    config: RunConfig
    step: int
    path: Path
    trained_length: int | None
    """The longest sequence that the model was trained on; None where a user's own schedule chose it, or where
    pictures were shown to a finished text model."""


def resolve_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """Return the checkpoint at a path, or the newest checkpoint of a run folder."""
    path = Path(run_or_checkpoint)
    if (path / MANIFEST).is_file():
        return path
    if is_named_as_checkpoint(path) and os.path.lexists(path):
        raise InputError(problem_of(path) or f"checkpoint {path} has no manifest")
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise FileNotFoundError(_what_is_there(path))
    return checkpoints[-1]


def _what_is_there(path: Path) -> str:
    """Say what a path has instead of a checkpoint, and what to give."""
    if (path / "config.json").is_file():
        return f"{path} is a Hugging Face folder; give a run folder or one of its checkpoints"
    if is_quantised_folder(path):
        return f"{path} is a folder of quantised weights; give a run folder or one of its checkpoints"
    runs = [str(run) for run in sorted(path.glob("*")) if list_checkpoints(run)][:5]
    runs += map(str, sorted(path.glob("snapshots/*")))  # of the cache of Hugging Face
    if runs:
        return f"{path} is a folder of runs or models; give one of these: {', '.join(runs)}"
    found = other_weights(path) or unfinished_download(path)
    return (
        f"no complete checkpoint at {path}{found}; give a run folder such as runs/tiny or one of its "
        "checkpoints/step_*, or, for generate and --init-from, a local Hugging Face folder with a config.json"
    )


def verified(run_or_checkpoint: str | Path, names: tuple[str, ...] = FILES_TO_USE_A_MODEL) -> Path:
    """Return the checkpoint at a path, or the newest good one of a run folder; warn of newer ones that are damaged.

    Errors are those of ``open_checkpoint``; ``verify_checkpoint`` explains ``names``.
    """
    newest = resolve_checkpoint(run_or_checkpoint)
    if newest == Path(run_or_checkpoint):
        verify_checkpoint(newest, names)
        return newest
    found, damaged = find_good_checkpoint(Path(run_or_checkpoint), names)
    problems = [problem for _, problem in damaged]
    if found is None:
        raise InputError("\n".join([*problems, f"{run_or_checkpoint} has no undamaged checkpoint"]))
    for problem in problems:
        warnings.warn(problem, stacklevel=3)
    if problems:
        warnings.warn(f"the newest undamaged checkpoint is used instead, {found}", stacklevel=3)
    return found


def open_checkpoint(run_or_checkpoint: str | Path) -> SavedModel:
    """Return the checkpoint at a path, or the newest good one of a run folder, after verifying its files.

    Raises:
        FileNotFoundError: if there is no complete checkpoint.
        InputError: if the checkpoint, or every one of the folder, is damaged or has another format.
    """
    path = verified(run_or_checkpoint)
    state, config = read_state(path), read_config(path)
    tokenizer = read_tokenizer(path, config.data.tokenizer.end_of_text)
    return SavedModel(
        path,
        config,
        tokenizer,
        state["step"],
        state["tokens_seen"],
        state["initialised_from"],
        state["router"],
        None if state["schedule"] or config.see else _trained_length(config, state["tokens_seen"]),
    )


def _trained_length(config: RunConfig, tokens_seen: int) -> int:
    """Return the longest sequence of the stages that have begun."""
    stages = config.schedule.stages
    begun = [after.seq_len for before, after in itertools.pairwise(stages) if (before.until_tokens or 0) < tokens_seen]
    return max([stages[0].seq_len, *begun])


def describe_model(path: str) -> str:
    """Return a short name for ``initialised_from``: the run and step of a checkpoint, else the folder."""
    place, how = Path(path.removesuffix(UPCYCLED)), UPCYCLED if path.endswith(UPCYCLED) else ""
    is_checkpoint = place.parent.name == "checkpoints"
    return (f"{place.parent.parent.name}, {place.name}" if is_checkpoint else place.name) + how


def load_model(
    run_or_checkpoint: str | Path, device: str | torch.device = "cpu", make_router: MakeRouter | None = None
) -> LoadedRun:
    """Return the model of a checkpoint, or of the newest one of a run folder, in evaluation mode.

    Args:
        make_router: the user's router that the model was trained with, if any.

    Raises:
        FileNotFoundError: if there is no complete checkpoint.
        InputError: if the checkpoint is damaged or has another format, or if its router is missing or different.
    """
    return load_saved(open_checkpoint(run_or_checkpoint), device, make_router)


def load_saved(saved: SavedModel, device: str | torch.device, make_router: MakeRouter | None) -> LoadedRun:
    """Return what ``load_model`` returns of a checkpoint that is open; the errors are the same."""
    make_router = router_for(saved.router, make_router, str(saved.path))
    weights = read_weights(saved.path, saved.config.model, make_router)
    model = MoEGPT(saved.config.model, make_router)
    copy_weights(model, weights, f"checkpoint {saved.path}")
    model = model.to(device).eval()
    return LoadedRun(model, saved.tokenizer, saved.config, saved.step, saved.path, saved.trained_length)


def load_adapted(saved: SavedModel) -> MoEGPT:
    """Return the model of a run with adapters, not merged.

    Raises:
        InputError: where the checkpoint is damaged.
    """
    verify_checkpoint(saved.path)
    model = MoEGPT(saved.config.model)
    let_learn(model, saved.config)
    load_weights(model, saved.path)
    return model
