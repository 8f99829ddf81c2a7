"""One checkpoint: everything that a run needs to resume bit for bit.

A checkpoint is a folder ``step_XXXXXXXX``. Weights, optimizer and random generators are safetensors; the rest is JSON
and YAML, so nothing needs unpickling. ``manifest.json`` has the size and SHA-256 of every file, which are verified
before use. The folder appears complete or not at all (``moe_gpt.files.durable``). ``write.py`` writes it, with each
tensor whole or in the pieces of several ranks (``shards.py``). ``listing.py`` finds the checkpoints of a run, and
``store.py`` decides which are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.config.yaml import parse_yaml
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.distributed.cut import gather_moved, local_part, own_part, whole_shape
from moe_gpt.distributed.process import SOLO, Team
from moe_gpt.distributed.sharding import gathered
from moe_gpt.errors import InputError, shown
from moe_gpt.files.inside import LARGEST_YAML, inside, read_json
from moe_gpt.files.tensors import TensorReader
from moe_gpt.interop import foreign_tokenizer
from moe_gpt.measure.shapes import shapes_only
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.adapters import acting_tensors, adapters_of, parts_of_adapted, tensors_of
from moe_gpt.training.saving.manifest import CONFIG, GENERATORS, OPTIMIZER, STATE, TOKENIZER, WEIGHTS
from moe_gpt.training.saving.shards import Piece, open_tensors, take_pieces
from moe_gpt.training.step import TrainState

_BESIDE_TEXT, _SCALE = ("value.", "cross.", "encoder.", "resampler."), "output.std"
"""Of names: tensors beside those of the text model, of PPO's value model or of what sees; the scale of a reward model's
scores."""

FORMAT_VERSION = 2
UPCYCLED = " (dense, every expert as its feed-forward network)"
"""Marks in ``initialised_from`` that the weights were upcycled."""


class _OwnCode(pydantic.BaseModel, strict=True):
    """A user's router or schedule (``describe_source``)."""

    name: str
    digest: str


class _State(pydantic.BaseModel, strict=True, extra="allow"):
    """The contents of ``state.json``. Format 1 lacks the keys with defaults."""

    format_version: Literal[1, 2]
    step: pydantic.NonNegativeInt
    tokens_seen: pydantic.NonNegativeInt
    data_fingerprint: dict[str, str]
    environment: dict[str, Any]
    skipped_windows: list[Annotated[list[int], pydantic.Field(min_length=2, max_length=2)]] = []
    skips_in_a_row: pydantic.NonNegativeInt = 0
    rollbacks: pydantic.NonNegativeInt = 0
    changes: list[dict[str, Any]] = []
    score: float | None = None
    is_scheduled: bool = True
    initialised_from: str | None = None
    router: _OwnCode | None = None
    schedule: _OwnCode | None = None


class RunIdentity(NamedTuple):
    """What every checkpoint of a process has in common."""

    config: RunConfig
    tokenizer: Tokenizer
    data_fingerprint: dict[str, str]
    environment: dict[str, Any]
    initialised_from: str | None = None
    """The model that the run's initial weights come from (--init-from)."""
    changes: tuple[dict[str, Any], ...] = ()
    """The changes that were allowed when the run was resumed (--allow-changes)."""
    router: dict[str, str] | None = None
    """Name and source digest of a user's router (``describe_source``); None for ours."""
    schedule: dict[str, str] | None = None
    """The same of a user's schedule."""


class Snapshot(NamedTuple):
    """The changing state of a run at one step: tensors by name, or the pieces of them that this rank saves."""

    weights: dict[str, Tensor] | list[Piece]
    optimizer: dict[str, Tensor] | list[Piece]
    generators: dict[str, Tensor]
    progress: dict[str, Any]
    """Plain values for state.json."""


def take_snapshot(
    state: TrainState,
    score: float | None = None,
    is_scheduled: bool = True,
    copy: bool = False,
    team: Team = SOLO,
    in_shards: bool = False,
) -> Snapshot:
    """Return the state of a run. All ranks must call it: they gather sharded tensors, one after another, on rank 0.

    Args:
        score: mean validation loss, if this step was evaluated.
        is_scheduled: False for a checkpoint made because of an interruption or the end of the run.
        copy: copy every tensor, so that training can go on while the snapshot is written.
        team: the ranks of the run.
        in_shards: gather nothing; each rank has its own pieces.
    """

    def kept(tensors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor] | list[Piece]:
        if in_shards:
            return take_pieces(tensors, copy)
        whole = gathered(state.model, tensors)
        return {name: tensor.to("cpu", copy=copy) for name, tensor in whole if team.is_main}

    progress = {
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "skipped_windows": [list(window) for window in state.skipped_windows],
        "skips_in_a_row": state.skips_in_a_row,
        "rollbacks": state.rollbacks,
        "score": score,
        "is_scheduled": is_scheduled,
    }
    moved: dict[str, tuple[Tensor, Tensor]] = {
        f"{name}.{part}": (tensor, parameter)
        for name, parameter in state.model.named_parameters()
        for part, tensor in state.optimizer.state.get(parameter, {}).items()
    }
    moved |= {name: (local_part(tensor), tensor) for name, tensor in parts_of_adapted(state.model).items()}
    weights = {name: (local_part(tensor), tensor) for name, tensor in acting_tensors(state.model).items()}
    generators = {name: tensor.cpu() for name, tensor in _generator_states(state).items()}
    return Snapshot(kept(weights), kept(moved), generators, progress)


def _generator_states(state: TrainState) -> dict[str, Tensor]:
    device = next(state.model.parameters()).device
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's ``state.json``; one of format 1 gets defaults for the keys that format 2 added."""
    try:
        state = read_json(path, STATE)
        version = state.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise InputError(f"it has format version {shown(version)}; this code reads 1 and {FORMAT_VERSION}")
        return _State.model_validate(state).model_dump()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {shown(first['input'])}"
        raise InputError(f"checkpoint {path}: {STATE} cannot be used: {reason}") from None
    except (OSError, InputError) as error:
        raise InputError(f"checkpoint {path}: {STATE} cannot be used: {error}") from None


def read_config(path: Path) -> RunConfig:
    """Return the resolved config saved with a checkpoint."""
    try:
        text = inside(path, CONFIG, at_most=LARGEST_YAML).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"checkpoint {path}: {CONFIG} is not UTF-8 text: {error}") from None
    try:
        config = RunConfig.from_mapping(parse_yaml(text, CONFIG))
    except InputError as error:
        lines = str(error).splitlines()
        raise InputError("\n".join(f"checkpoint {path}: {CONFIG}: {line.strip()}" for line in lines)) from None
    if config.model.vocab_size is None:
        raise InputError(f"checkpoint {path}: {CONFIG} must have a model.vocab_size, got null")
    return config


def read_tokenizer(path: Path, end_of_text: str) -> Tokenizer:
    """Return the tokenizer saved with a checkpoint."""
    return foreign_tokenizer.read_tokenizer(inside(path, TOKENIZER), end_of_text)


def read_weights(
    path: Path, config: ModelConfig, make_router: MakeRouter = Router, kind: type[MoEGPT] = MoEGPT
) -> dict[str, Tensor]:
    """Return a checkpoint's weights by name, after comparing their names and shapes with the config.

    Memory is allocated only after this comparison, so a wrong config cannot exhaust it. Of a policy with a value model
    beside it, and of a model that sees, an ordinary model (``kind``) gets the text model.

    Raises:
        InputError: naming tensors that are missing, left over or of another shape; or the file, if it is not
            safetensors.
    """
    reader = open_tensors(path, WEIGHTS)
    if config.n_layers > len(reader.names):  # the shapes of an absurd number of layers would take long to list
        raise InputError(f"checkpoint {path} is of another model, with {len(reader.names)} tensors")
    own = tensors_of(shapes_only(config, make_router, kind))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    names = [name for name in reader.names if kind is not MoEGPT or not name.startswith(_BESIDE_TEXT)]
    if _SCALE in set(names) - own.keys():
        raise InputError(
            f"checkpoint {path} is of a reward model: it scores answers (rl.reward_model), and has no text"
        )
    _compare(shapes, {name: reader.shape(name) for name in names}, f"checkpoint {path}")
    return {name: reader.read(name) for name in names}


def copy_weights(model: MoEGPT, saved: Mapping[str, Tensor], origin: str) -> None:
    """Copy weights into a model.

    Args:
        saved: every parameter and buffer by name.
        origin: the source of the weights, for the error.
    """
    own = tensors_of(model)
    if hasattr(model, "stages"):
        saved = {name: saved[name] for name in own.keys() & saved.keys()}
    _compare({n: whole_shape(t) for n, t in own.items()}, {n: tuple(t.shape) for n, t in saved.items()}, origin)
    with torch.no_grad():
        for name, tensor in own.items():
            local_part(tensor).copy_(own_part(saved[name], tensor))
    gather_moved(own.values())


def load_weights(model: MoEGPT, path: Path, kind: type[MoEGPT] = MoEGPT) -> None:
    """Copy a checkpoint's weights into a model, which may have the adapters that the checkpoint's run has.

    Args:
        kind: the model's class before it was parallelized.
    """
    weights = read_weights(path, model.config, model.make_router, kind)
    if parts := parts_of_adapted(model):
        saved, adapted = open_tensors(path, OPTIMIZER), adapters_of(model)
        weights = {name: tensor for name, tensor in weights.items() if name not in adapted}
        weights |= {name: saved.read(name) for name in parts if name in saved.names}
    copy_weights(model, weights, f"checkpoint {path}")


def _compare(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], origin: str) -> None:
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is left over" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {found[name]}, the model wants {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    if problems:
        raise InputError(f"{origin} is of another model: {'; '.join(sorted(problems)[:5])}")


def _load_moments(state: TrainState, path: Path) -> None:
    """Restore the optimizer's state of every parameter that it trains."""
    saved = open_tensors(path, OPTIMIZER)
    for name, parameter in state.model.named_parameters():
        state.optimizer.state.pop(parameter, None)
        if id(parameter) not in state.optimizer.methods:  # it is frozen
            continue
        parts = state.optimizer.state_shapes(parameter)
        if any(f"{name}.{part}" in saved.names for part in parts):
            shapes = {f"{name}.{part}": shape for part, (shape, _) in parts.items()}
            found = {key: saved.shape(key) for key in shapes if key in saved.names}
            _compare(shapes, found, f"checkpoint {path}: {OPTIMIZER}")
            # the step count belongs on the parameter's device, too; a copy, because the reader may map the file
            state.optimizer.state[parameter] = {
                part: _part_of(saved.read(f"{name}.{part}"), parameter).to(parameter.device, dtype, copy=True)
                for part, (_, dtype) in parts.items()
            }


def load_training_state(state: TrainState, path: Path) -> None:
    """Restore weights, optimizer, progress and random generators from a verified checkpoint."""
    model = state.model
    load_weights(model, path, state.kind)
    _load_moments(state, path)
    progress = read_state(path)
    state.step, state.tokens_seen = progress["step"], progress["tokens_seen"]
    state.skipped_windows = [(start, end) for start, end in progress["skipped_windows"]]
    state.skips_in_a_row, state.rollbacks = progress["skips_in_a_row"], progress["rollbacks"]
    try:
        _restore_generators(TensorReader([inside(path, GENERATORS)]), next(model.parameters()).device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"checkpoint {path}: {GENERATORS} has no state of random generators: {error}") from None


def _part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a running mean, which is cut as its parameter is; a step count is whole."""
    return own_part(tensor, parameter).contiguous() if tensor.shape == whole_shape(parameter) else tensor


def _restore_generators(saved: TensorReader, device: torch.device) -> None:
    torch.set_rng_state(saved.read("cpu").clone())
    if device.type == "cuda" and "cuda" in saved.names:
        torch.cuda.set_rng_state(saved.read("cuda").clone(), device)
    if device.type == "mps" and "mps" in saved.names:
        torch.mps.set_rng_state(saved.read("mps").clone())
