"""Reading what a run recorded, for reports: whatever is there, and a note for what is missing or cannot be read.

It reads the run's folder alone, runs no code from it and never raises for a file that is damaged or from another
version: a report of half a run is worth more than none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moe_gpt.data.tokenizer import END_OF_TEXT, Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.measure.health import Gradients

_SECTIONS = ("model", "data", "schedule", "train", "faults")
_NUMBERS = {"ce_loss", "loss", "lr", "seq_len", "batch_tokens", "tokens_per_second", "grad_norm"}
EVALUATION_FILES = "evaluations/step_*.safetensors"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Held-out text of one source with the experts that every token went to."""

    tokens: np.ndarray
    """Token ids (B, T)."""
    choices: np.ndarray
    """Experts, best first (L, B, T, K); no layers for a dense model."""


@dataclasses.dataclass(frozen=True)
class EvaluationArrays:
    """What one evaluation kept besides its scores; each dictionary has the sources that are there."""

    step: int
    nats: dict[str, np.ndarray]
    """Summed cross entropy at each position (T,)."""
    counts: dict[str, np.ndarray]
    """Scored tokens at each position (T,)."""
    tokens_per_expert: dict[str, np.ndarray]
    """Assignments over all held-out tokens (L, E)."""
    slices: dict[str, Slice]
    gradients: Gradients | None


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """A run as it was recorded."""

    name: str
    run_dir: Path
    config: dict[str, Any]
    """The resolved config as plain values; empty where it cannot be read."""
    steps: list[dict[str, Any]]
    """The line of every optimizer step."""
    records: list[dict[str, Any]]
    """Lines with ``groups``, and ``routing`` unless the model is dense."""
    evaluations: list[dict[str, Any]]
    """Lines with ``val/...``."""
    events: list[dict[str, Any]]
    """Lines of events.jsonl."""
    arrays: list[EvaluationArrays]
    """Of the evaluations that have them, oldest first."""
    tokenizer: Tokenizer | None
    tokenizer_digest: str | None
    """SHA-256 of the tokenizer: runs with different ones cannot be compared by loss."""
    notes: list[str]
    """What is missing or could not be read, in words."""

    @property
    def sources(self) -> list[str]:
        """The names of the sources, as in the config, or else as evaluated."""
        sources = _section(self.config, "data").get("sources")
        named = [source.get("name") for source in sources or ()]
        found = {key.split("/")[1]: None for line in self.evaluations for key in line if key.count("/") == 2}
        return [name for name in named if name] or list(found)

    def scores(self, source: str, key: str = "ce_loss") -> tuple[np.ndarray, np.ndarray]:
        """Return ``tokens_seen`` and a value of one source at every evaluation that has it."""
        lines = [line for line in self.evaluations if line.get(f"val/{source}/{key}") is not None]
        return _column(lines, "tokens_seen"), _column(lines, f"val/{source}/{key}")

    def step_values(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ``tokens_seen`` and a value of every step that has it; steps that were skipped have no loss."""
        lines = [line for line in self.steps if line.get(key) is not None]
        return _column(lines, "tokens_seen"), _column(lines, key)

    def routing_values(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ``tokens_seen`` (R,) and a value by layer (R, L) or (R, L, E) of every recorded step."""
        lines = [line for line in self.records if key in line.get("routing", ())]
        values = np.array([line["routing"][key] for line in lines], dtype=float)
        return _column(lines, "tokens_seen"), values

    def norms(self, group: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ``tokens_seen`` and a norm of a group of parameters at every recorded step."""
        lines = [line for line in self.records if kind in line.get("groups", {}).get(group, ())]
        return _column(lines, "tokens_seen"), np.array([line["groups"][group][kind] for line in lines], dtype=float)


def _column(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([line.get(key) for line in lines], dtype=float)


def read_run(run_dir: str | Path) -> RunRecords:
    """Read what a run's folder has.

    Raises:
        InputError: where there is no such folder, or nothing in it that a run writes.
    """
    folder, notes = Path(run_dir), list[str]()
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}; give one that scripts/train.py has written")
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise InputError(f"{folder} is no run: it has neither config.yaml nor metrics.jsonl")
    config = _read_config(folder / "config.yaml", notes)
    lines = list(_read_lines(folder / "metrics.jsonl", ("step", "tokens_seen"), notes))
    evaluations = [line for line in lines if any(key.startswith("val/") for key in line)]
    records = [line for line in lines if isinstance(line.get("groups"), dict)]
    tokenizer, digest = _read_tokenizer(folder / "tokenizer.json", config, notes)
    arrays = list(_read_arrays(folder, _section(config, "model"), notes))
    is_dense = _section(config, "model").get("n_experts") == 1
    if lines:
        notes += _what_is_missing(evaluations, records, arrays, _section(config, "train"), is_dense)
    return RunRecords(
        name=folder.resolve().name,
        run_dir=folder,
        config=config,
        steps=[line for line in lines if "ce_loss" in line],
        records=records,
        evaluations=evaluations,
        events=list(_read_lines(folder / "events.jsonl", ("step",), notes)),
        arrays=arrays,
        tokenizer=tokenizer,
        tokenizer_digest=digest,
        notes=notes,
    )


def _what_is_missing(
    evaluations: list[dict[str, Any]],
    records: list[dict[str, Any]],
    arrays: list[EvaluationArrays],
    train: dict[str, Any],
    is_dense: bool,
) -> Iterator[str]:
    """Say in words what a report would need and the run has not recorded, and which setting is why."""
    without_arrays = {line["step"] for line in evaluations} - {found.step for found in arrays}
    if not evaluations:
        yield "no evaluation: the run has not reached its first"
    elif not arrays:
        yield "no arrays of evaluations (evaluations/*.safetensors): nothing about which tokens go where"
    elif without_arrays:
        steps = ", ".join(map(str, sorted(without_arrays)))
        yield f"no arrays of the evaluations after steps {steps}: what is said about experts is of other evaluations"
    if arrays and not is_dense and not any(found.slices for found in arrays):
        yield "no experts of single tokens, and no gradients of cross entropy (train.record_tokens is 0)"
    if train.get("record_every_steps") == 0:
        yield "no recorded steps (train.record_every_steps is 0)"
    elif not records:
        every = train.get("record_every_steps", "not set")
        yield f"no recorded steps: the run is shorter than train.record_every_steps ({every}), or from an older version"
    elif not is_dense and not any("routing" in record for record in records):
        yield "no recorded routing, though the model has experts"


def _section(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of the settings, empty where it is none: a stranger's config may hold anything."""
    section = settings.get(key)
    return section if isinstance(section, dict) else {}


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"config.yaml cannot be read: {_first_line(error)}")
        return {}
    if not isinstance(config, dict):
        notes.append("config.yaml has no settings")
        return {}
    for key in _SECTIONS:
        if key in config and not isinstance(config[key], dict):
            notes.append(f"config.yaml: {key} is no section")
            del config[key]
    sources = _section(config, "data").get("sources", [])
    if not (isinstance(sources, list) and all(isinstance(source, dict) for source in sources)):
        notes.append("config.yaml: data.sources is no list of sections")
        del config["data"]["sources"]
    return config


def _read_lines(path: Path, counts: tuple[str, ...], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines that have each of ``counts`` as an integer, and a number or null for what a report draws."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {_first_line(error)}")
        return
    n_damaged = 0
    for text in texts:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and _is_sound(line, counts):
            yield line
        else:
            n_damaged += 1
    if n_damaged:
        notes.append(f"{path.name}: {n_damaged} of {len(texts)} lines cannot be read")


def _is_sound(line: dict[str, Any], counts: tuple[str, ...]) -> bool:
    drawn = [value for key, value in line.items() if key in _NUMBERS or key.startswith("val/")]
    return all(isinstance(line.get(key), int) for key in counts) and all(
        value is None or isinstance(value, int | float) for value in drawn
    )


def _read_tokenizer(path: Path, config: dict[str, Any], notes: list[str]) -> tuple[Tokenizer | None, str | None]:
    end_of_text = _section(_section(config, "data"), "tokenizer").get("end_of_text") or END_OF_TEXT
    try:
        tokenizer = Tokenizer.load(path, str(end_of_text))
        return tokenizer, hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, InputError) as error:
        notes.append(f"tokenizer.json cannot be read, so tokens have no text: {_first_line(error)}")
        return None, None


def _read_arrays(folder: Path, model: dict[str, Any], notes: list[str]) -> Iterator[EvaluationArrays]:
    for path in sorted(folder.glob(EVALUATION_FILES)):
        try:
            arrays, step = load_file(path), int(path.stem.removeprefix("step_"))
        except (OSError, ValueError, SafetensorError) as error:
            notes.append(f"{path.name} cannot be read: {_first_line(error)}")
            continue
        by_kind: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            source, _, kind = name.rpartition("/")
            by_kind.setdefault(kind, {})[source] = array
        counts = by_kind.get("tokens_per_expert", {})
        shape = (model.get("n_layers"), model.get("n_experts"))
        if model and any(found.shape != shape for found in counts.values()):
            text = f"it has not {shape[0]} layers of {shape[1]} experts"
            notes.append(f"{path.name} is of another model, and left out: {text}")
            continue
        choices = by_kind.get("choices", {})
        routers, experts = arrays.get("gradients/routers"), arrays.get("gradients/experts")
        yield EvaluationArrays(
            step=step,
            nats=by_kind.get("nats", {}),
            counts=by_kind.get("counts", {}),
            tokens_per_expert=counts,
            slices={s: Slice(tokens, choices[s]) for s, tokens in by_kind.get("tokens", {}).items() if s in choices},
            gradients=Gradients(routers, experts) if routers is not None and experts is not None else None,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
