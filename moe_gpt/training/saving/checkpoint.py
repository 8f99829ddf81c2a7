"""One checkpoint: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder ``step_XXXXXXXX``: weights, optimizer and random generators as safetensors, the rest as JSON
and YAML; nothing needs unpickling. ``manifest.json`` has the size and SHA-256 of every file and is compared with them
before anything is used. The folder appears complete or not at all (``moe_gpt.files.durable``). Which
checkpoints a run has, and which of them it keeps, is ``moe_gpt.training.saving.store``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.config.yaml import parse_yaml, to_yaml
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError, shown
from moe_gpt.files.durable import FileDigest, complete_folder, read_digest, write_file
from moe_gpt.files.tensors import TensorReader, TensorSpec, write_tensors
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.shapes import shapes_only
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.step import TrainState

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
UPCYCLED = " (dense, every expert as its feed-forward network)"
"""Marks in ``initialised_from`` that the weights were upcycled."""
WEIGHTS, _OPTIMIZER, _GENERATORS = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
_STATE, _CONFIG, _TOKENIZER = "state.json", "config.yaml", "tokenizer.json"
FILES = (WEIGHTS, _OPTIMIZER, _GENERATORS, _STATE, _CONFIG, _TOKENIZER)
FILES_TO_USE_A_MODEL = (WEIGHTS, _STATE, _CONFIG, _TOKENIZER)
_OPTIMIZER_PARTS = ("step", "exp_avg", "exp_avg_sq")
_LARGEST_MANIFEST = 1_000_000
_ADDED_IN_VERSION_2: dict[str, Any] = {
    "skipped_windows": [],
    "skips_in_a_row": 0,
    "rollbacks": 0,
    "changes": [],
    "score": None,
    "is_scheduled": True,
    "initialised_from": None,
    "router": None,
    "schedule": None,
}


class RunIdentity(NamedTuple):
    """What stays the same while a process trains and is saved with every checkpoint."""

    config: RunConfig
    tokenizer: Tokenizer
    data_fingerprint: dict[str, str]
    environment: dict[str, Any]
    initialised_from: str | None = None
    """The model whose weights the run started with (--init-from)."""
    changes: tuple[dict[str, Any], ...] = ()
    """What was changed on purpose when the run was resumed (--allow-changes)."""
    router: dict[str, str] | None = None
    """Name and source digest of a router of one's own (``describe_source``)."""
    schedule: dict[str, str] | None = None
    """Of a schedule of one's own."""


class Snapshot(NamedTuple):
    """Everything of a run that changes, at one step."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    generators: dict[str, Tensor]
    progress: dict[str, Any]
    """Plain values for state.json."""


def model_tensors(model: MoEGPT) -> dict[str, Tensor]:
    """Return every distinct parameter and buffer by name; shared ones have the first of their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def take_snapshot(
    state: TrainState, score: float | None = None, is_scheduled: bool = True, copy: bool = False
) -> Snapshot:
    """Return a run's state.

    Args:
        state: what is being trained.
        score: mean validation loss at this step, where it was evaluated.
        is_scheduled: whether ``checkpoint.every_steps`` asked for it, rather than an interruption or the end.
        copy: copy every tensor, so that training may go on while the snapshot is written.
    """

    def kept(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.detach().to("cpu", copy=copy) for name, t in tensors.items()}

    progress = {
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "skipped_windows": [list(window) for window in state.skipped_windows],
        "skips_in_a_row": state.skips_in_a_row,
        "rollbacks": state.rollbacks,
        "score": score,
        "is_scheduled": is_scheduled,
    }
    optimizer = _optimizer_tensors(state)
    return Snapshot(kept(model_tensors(state.model)), kept(optimizer), kept(_generator_states(state)), progress)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": state.optimizer.state[parameter][part]
        for name, parameter in state.model.named_parameters()
        for part in _OPTIMIZER_PARTS
        if parameter in state.optimizer.state
    }


def _generator_states(state: TrainState) -> dict[str, Tensor]:
    device = state.model.embedding.weight.device
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def write_checkpoint(folder: Path, snapshot: Snapshot, identity: RunIdentity) -> None:
    """Write a checkpoint; one of the same name is replaced. Equal state gives equal files.

    Raises:
        OSError: where it cannot be written; then nothing has changed.
    """
    with complete_folder(folder, replace=True) as temporary:
        tensors = {WEIGHTS: snapshot.weights, _OPTIMIZER: snapshot.optimizer, _GENERATORS: snapshot.generators}
        written = {name: _write_tensors(temporary / name, values) for name, values in tensors.items()}
        state = {
            "format_version": FORMAT_VERSION,
            **snapshot.progress,
            "data_fingerprint": identity.data_fingerprint,
            "environment": identity.environment,
            "initialised_from": identity.initialised_from,
            "changes": list(identity.changes),
            "router": identity.router,
            "schedule": identity.schedule,
        }
        texts = {
            _STATE: json.dumps(state, indent=2),
            _CONFIG: to_yaml(identity.config),
            _TOKENIZER: identity.tokenizer.to_json(),
        }
        written |= {name: write_file(temporary / name, [text.encode("utf-8")]) for name, text in texts.items()}
        manifest = {name: file._asdict() for name, file in written.items()}
        write_file(temporary / MANIFEST, [json.dumps(manifest, indent=2).encode()])


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> FileDigest:
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    return write_tensors(path, specs, tensors.__getitem__)


def verify_checkpoint(path: Path, names: tuple[str, ...] = FILES) -> None:
    """Compare files of a checkpoint with its manifest: all of them, or those that will be read.

    Sizes are compared first, and no file is read that the manifest does not know or that has another size.

    Raises:
        InputError: naming the checkpoint and the file that is missing, of another size, changed or foreign; or where
            the checkpoint is of another step than its name says.
    """
    manifest = _read_manifest(path)
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"checkpoint {path}: {name} is missing")
        size = (path / name).stat().st_size
        if size != manifest[name].bytes:
            raise InputError(f"checkpoint {path}: {name} has {size:,} bytes, saved were {manifest[name].bytes:,}")
    for name in names:
        if read_digest(path / name) != manifest[name]:
            raise InputError(f"checkpoint {path}: {name} is not the file that was saved: its SHA-256 differs")
    step = read_state(path)["step"]
    if re.fullmatch(r"step_\d+", path.name) and int(path.name[5:]) != step:
        raise InputError(
            f"checkpoint {path}: {_STATE} is of step {step}; if the folder was renamed, call it step_{step:08d}"
        )


def _read_manifest(path: Path) -> dict[str, FileDigest]:
    file = path / MANIFEST
    try:
        if file.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"{file.stat().st_size} bytes are too many")
        values = json.loads(file.read_text(encoding="utf-8"))
        if set(values) != set(FILES):
            raise ValueError(f"it must list {', '.join(FILES)}, got {', '.join(map(str, values))[:200]}")
        manifest = {name: FileDigest(**digest) for name, digest in values.items()}
        if not all(isinstance(digest.bytes, int) and isinstance(digest.sha256, str) for digest in manifest.values()):
            raise ValueError("every file must have a whole number of bytes and the digest as text")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"checkpoint {path}: {MANIFEST} cannot be used: {error}") from None
    return manifest


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's ``state.json``; one of format 1 is completed with what it did not have.

    Raises:
        InputError: where it cannot be read or was written in another format.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        version = state["format_version"]
        known = {key: state[key] for key in ("step", "tokens_seen", "data_fingerprint", "environment")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"checkpoint {path}: {_STATE} cannot be used: {error!r}") from None
    if version not in (1, FORMAT_VERSION):
        raise InputError(f"checkpoint {path} has format version {version}, this code reads 1 and {FORMAT_VERSION}")
    if not all(isinstance(known[key], int) and known[key] >= 0 for key in ("step", "tokens_seen")):
        raise InputError(f"checkpoint {path}: {_STATE} must count step and tokens_seen, got {shown(known)}")
    return _ADDED_IN_VERSION_2 | state


def read_config(path: Path) -> RunConfig:
    """Return the resolved config saved with a checkpoint.

    Raises:
        InputError: where it is not a config of this version.
    """
    try:
        text = (path / _CONFIG).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"checkpoint {path}: {_CONFIG} is not UTF-8 text: {error}") from None
    try:
        config = RunConfig.from_mapping(parse_yaml(text, _CONFIG))
    except InputError as error:
        lines = str(error).splitlines()
        raise InputError("\n".join(f"checkpoint {path}: {_CONFIG}: {line.strip()}" for line in lines)) from None
    if config.model.vocab_size is None:
        raise InputError(f"checkpoint {path}: {_CONFIG} has no model.vocab_size; it is not the config of a checkpoint")
    return config


def read_tokenizer(path: Path, end_of_text: str) -> Tokenizer:
    """Return the tokenizer saved with a checkpoint."""
    return Tokenizer.load(path / _TOKENIZER, end_of_text)


def read_weights(path: Path, config: ModelConfig, make_router: MakeRouter = Router) -> dict[str, Tensor]:
    """Return a checkpoint's weights by name, after comparing their names and shapes with the config.

    Nothing of the size that the config names is allocated before the file is known to hold it.

    Raises:
        InputError: naming tensors that are missing, left over or of another shape; or the file, if it is not
            safetensors.
    """
    reader = TensorReader([path / WEIGHTS])
    if config.n_layers > len(reader.names):  # a model without end would take long to describe
        raise InputError(f"checkpoint {path} is of another model: it has {len(reader.names)} tensors in all")
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(shapes_only(config, make_router)).items()}
    _compare(shapes, {name: reader.shape(name) for name in reader.names}, f"checkpoint {path}")
    return {name: reader.read(name) for name in reader.names}


def copy_weights(model: MoEGPT, saved: Mapping[str, Tensor], origin: str) -> None:
    """Copy weights into a model.

    Args:
        model: where they go.
        saved: every parameter and buffer by name.
        origin: where they come from, for the error.

    Raises:
        InputError: naming tensors that are missing, left over or of another shape.
    """
    own = model_tensors(model)
    _compare({n: tuple(t.shape) for n, t in own.items()}, {n: tuple(t.shape) for n, t in saved.items()}, origin)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


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


def load_training_state(state: TrainState, path: Path) -> None:
    """Restore weights, optimizer, progress and random generators from a verified checkpoint.

    Raises:
        InputError: where it is of another model or format.
    """
    model = state.model
    copy_weights(model, read_weights(path, model.config, model.make_router), f"checkpoint {path}")
    saved = TensorReader([path / _OPTIMIZER])
    for name, parameter in state.model.named_parameters():
        if f"{name}.step" in saved.names:
            # its step count too belongs beside the parameter; copied, because what is read may be mapped onto the file
            state.optimizer.state[parameter] = {
                part: saved.read(f"{name}.{part}").to(parameter.device, copy=True) for part in _OPTIMIZER_PARTS
            }
        else:
            state.optimizer.state.pop(parameter, None)
    progress = read_state(path)
    state.step, state.tokens_seen = progress["step"], progress["tokens_seen"]
    state.skipped_windows = [(start, end) for start, end in progress["skipped_windows"]]
    state.skips_in_a_row, state.rollbacks = progress["skips_in_a_row"], progress["rollbacks"]
    generators = TensorReader([path / _GENERATORS])
    device = state.model.embedding.weight.device
    torch.set_rng_state(generators.read("cpu").clone())
    if device.type == "cuda" and "cuda" in generators.names:
        torch.cuda.set_rng_state(generators.read("cuda").clone(), device)
    if device.type == "mps" and "mps" in generators.names:
        torch.mps.set_rng_state(generators.read("mps").clone())


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first; what is in them is not looked at."""
    found = [path for path in run_dir.glob("checkpoints/step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[5:]))
