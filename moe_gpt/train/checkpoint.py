"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder ``step_XXXXXXXX``: weights, optimizer and random generators as safetensors, the rest as
JSON and YAML; nothing needs unpickling. It is written under a temporary name; ``manifest.json``, written last, has
the size and SHA-256 of every file; then the folder is renamed. So a folder without a temporary name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_gpt.config import RunConfig
from moe_gpt.config_file import parse_yaml, to_plain, to_yaml
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.train.step import TrainState
from moe_gpt.validation import InputError

FORMAT_VERSION = 1
_WEIGHTS = "model.safetensors"
_FILES = (
    _WEIGHTS,
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "config.yaml",
    "tokenizer.json",
)
_FILES_TO_USE_A_MODEL = (_WEIGHTS, "state.json", "config.yaml", "tokenizer.json")
_TEMPORARY = ".tmp"
_OPTIMIZER_PARTS = ("step", "exp_avg", "exp_avg_sq")


class RunFacts(NamedTuple):
    """What stays the same during a run and is saved with every checkpoint."""

    config: RunConfig
    tokenizer: Tokenizer
    data_fingerprint: dict[str, str]
    environment: dict[str, Any]
    initialised_from: str | None = None
    """The checkpoint whose weights the run started with (--init-from)."""


class SavedModel(NamedTuple):
    """A verified checkpoint, as far as using its model needs it; the weights are not read yet."""

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    step: int
    tokens_seen: int
    initialised_from: str | None

    @property
    def weights_file(self) -> Path:
        """Where the weights are, by our names."""
        return self.path / _WEIGHTS

    @property
    def run_dir(self) -> Path:
        """The run that the checkpoint belongs to, while it lies where it was written."""
        return self.path.parent.parent


class LoadedRun(NamedTuple):
    """A trained model with what is needed to use it."""

    model: MoEGPT
    tokenizer: Tokenizer
    config: RunConfig
    step: int
    path: Path


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Return what bit-identical resume depends on besides config and data."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def model_tensors(model: MoEGPT) -> dict[str, Tensor]:
    """Return every distinct parameter and buffer by name; shared ones have the first of their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def save_checkpoint(run_dir: Path, state: TrainState, facts: RunFacts, keep_last: int) -> Path:
    """Write ``run_dir/checkpoints/step_XXXXXXXX`` and delete older checkpoints beyond ``keep_last``.

    Raises:
        OSError: where it cannot be written; the checkpoints that were there are intact.
    """
    folder = run_dir / "checkpoints" / f"step_{state.step:08d}"
    temporary = folder.with_name(folder.name + _TEMPORARY)
    for leftover in folder.parent.glob(f"step_*{_TEMPORARY}"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_files(temporary, state, facts)
        manifest = {name: _size_and_digest(temporary / name) for name in _FILES}
        _write_text(temporary / "manifest.json", json.dumps(manifest, indent=2))
        _sync_folder(temporary)
        _delete(folder)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(run_dir)[:-keep_last]:
        _delete(old)
    return folder


def _delete(folder: Path) -> None:
    """Delete a checkpoint such that, killed at any instant, it is complete or not found."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.deleted{_TEMPORARY}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write_files(folder: Path, state: TrainState, facts: RunFacts) -> None:
    _save_tensors(folder / _WEIGHTS, model_tensors(state.model))
    _save_tensors(folder / "optimizer.safetensors", _optimizer_tensors(state))
    _save_tensors(folder / "rng.safetensors", _generator_states(state))
    progress = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "data_fingerprint": facts.data_fingerprint,
        "environment": facts.environment,
        "initialised_from": facts.initialised_from,
    }
    _write_text(folder / "state.json", json.dumps(progress, indent=2))
    _write_text(folder / "config.yaml", to_yaml(facts.config))
    _write_text(folder / "tokenizer.json", facts.tokenizer.to_json())


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()  # with the user's permissions; safetensors would make it readable for the owner only
    try:
        save_file(contiguous, path)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} could not be written: {error}") from error
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


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


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _size_and_digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's complete checkpoints, oldest first."""
    found = run_dir.glob("checkpoints/step_*/manifest.json")
    return sorted(path.parent for path in found if not path.parent.name.endswith(_TEMPORARY))


def resolve_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest complete one of a run folder.

    Raises:
        FileNotFoundError: where it is neither.
    """
    path = Path(run_or_checkpoint)
    if (path / "manifest.json").is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise FileNotFoundError(
            f"no complete checkpoint at {path}; give a run folder such as runs/tiny or one of its checkpoints/step_*"
        )
    return checkpoints[-1]


def verify_checkpoint(path: Path, names: tuple[str, ...] = _FILES) -> None:
    """Compare files of a checkpoint with its manifest: all of them, or those that will be read.

    Raises:
        InputError: naming the checkpoint and the file that is missing, of another size, or changed.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: manifest[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path}: manifest.json cannot be used: {error!r}") from None
    for name, facts in expected.items():
        if not (path / name).is_file():
            raise InputError(f"checkpoint {path}: {name} is missing")
        if _size_and_digest(path / name) != facts:
            raise InputError(
                f"checkpoint {path}: {name} is not the file that was saved; delete this folder to use the one before"
            )


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's ``state.json``.

    Raises:
        InputError: where it was written in another format.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format version {state.get('format_version')}, this code reads {FORMAT_VERSION}"
        )
    return state


def read_config(path: Path) -> RunConfig:
    """Return the resolved config saved with a checkpoint.

    Raises:
        ConfigError: where it is not a config of this version.
    """
    text = (path / "config.yaml").read_text(encoding="utf-8")
    return RunConfig.from_mapping(parse_yaml(text, str(path / "config.yaml")))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by name.

    Raises:
        InputError: where the file cannot be read.
    """
    return _read_tensors(path / _WEIGHTS)


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
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    problems = [f"{name} is missing" for name in missing] + [f"{name} is left over" for name in extra]
    problems += [
        f"{name} has shape {tuple(saved[name].shape)}, the model wants {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if own[name].shape != saved[name].shape
    ]
    if problems:
        raise InputError(f"{origin} is of another model: {'; '.join(sorted(problems)[:5])}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def load_training_state(state: TrainState, path: Path) -> None:
    """Restore weights, optimizer, progress and random generators from a verified checkpoint.

    Raises:
        InputError: where it is of another model or format.
    """
    copy_weights(state.model, read_weights(path), f"checkpoint {path}")
    saved = _read_tensors(path / "optimizer.safetensors")
    for name, parameter in state.model.named_parameters():
        if f"{name}.step" in saved:
            parts = {part: saved[f"{name}.{part}"] for part in _OPTIMIZER_PARTS}
            # its step count too belongs beside the parameter; copied, because what is loaded is mapped onto the file
            state.optimizer.state[parameter] = {
                part: tensor.to(parameter.device, copy=True) for part, tensor in parts.items()
            }
    progress = read_state(path)
    state.step, state.tokens_seen = progress["step"], progress["tokens_seen"]
    generators = _read_tensors(path / "rng.safetensors")
    torch.set_rng_state(generators["cpu"])
    device = state.model.embedding.weight.device
    if device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], device)
    if device.type == "mps" and "mps" in generators:
        torch.mps.set_rng_state(generators["mps"])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def open_checkpoint(run_or_checkpoint: str | Path) -> SavedModel:
    """Return a run folder's newest checkpoint, or one checkpoint, after comparing its files with the manifest.

    Raises:
        FileNotFoundError: where there is no complete checkpoint.
        InputError: where it is damaged or of another format.
    """
    path = resolve_checkpoint(run_or_checkpoint)
    verify_checkpoint(path, _FILES_TO_USE_A_MODEL)
    state, config = read_state(path), read_config(path)
    tokenizer = Tokenizer.load(path / "tokenizer.json", config.data.tokenizer.end_of_text)
    return SavedModel(path, config, tokenizer, state["step"], state["tokens_seen"], state["initialised_from"])


def describe_model(path: str) -> str:
    """Name a model by its path: the run and the step of a checkpoint, else the folder."""
    place = Path(path)
    return f"{place.parent.parent.name}, {place.name}" if place.parent.name == "checkpoints" else place.name


def load_model(run_or_checkpoint: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Return the model of a run folder's newest checkpoint, or of one checkpoint, in evaluation mode.

    Raises:
        FileNotFoundError: where there is no complete checkpoint.
        InputError: where it is damaged or of another format.
    """
    saved = open_checkpoint(run_or_checkpoint)
    model = MoEGPT(saved.config.model)
    copy_weights(model, read_weights(saved.path), f"checkpoint {saved.path}")
    return LoadedRun(model.to(device).eval(), saved.tokenizer, saved.config, saved.step, saved.path)


_MAY_DIFFER = ("checkpoint.", "train.eval_every_steps", "train.log_every_steps", "data.cache_dir")


def check_same_run(saved: RunConfig, wanted: RunConfig) -> None:
    """Check that a resumed run computes what the saved one would have.

    Raises:
        InputError: naming every key that differs and would change the result.
    """
    old, new = _flatten(to_plain(saved)), _flatten(to_plain(wanted))
    problems = [
        f"{key} is {old.get(key)!r} in the run, got {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_MAY_DIFFER) and not key.endswith(".prompt")
    ]
    if problems:
        raise InputError(
            "--resume needs the run's own settings; to change them start a new run with --init-from\n"
            + "\n".join(problems)
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = {str(i): item for i, item in enumerate(value)}.items()
    else:
        return {prefix: value}
    return {k: v for key, item in items for k, v in _flatten(item, f"{prefix}.{key}".lstrip(".")).items()}
