"""Reading what a run recorded, for reports: whatever is there, and a note for what is missing or cannot be read.

It reads the run's folder alone, runs no code from it and never raises for a file that is damaged or from another
version: a report of half a run is worth more than none.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moe_gpt.data.tokenizer import END_OF_TEXT, Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.json_lines import FoundLines, read_json_lines
from moe_gpt.measure.health import Gradients
from moe_gpt.measure.metric_names import VALIDATION, MetricName, scored_sources
from moe_gpt.report.series import Series

T = TypeVar("T")
_SECTIONS = ("model", "data", "schedule", "train", "faults")
_NUMBERS = {"ce_loss", "loss", "lr", "seq_len", "batch_tokens", "tokens_per_second", "grad_norm"}
_EVALUATION_FILES = "evaluations/step_*.safetensors"


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

    def have_shape(self, shape: tuple[Any, Any]) -> bool:
        """Whether all counts are of a model with so many layers and experts."""
        return all(counts.shape == shape for counts in self.tokens_per_expert.values())


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

    def section(self, key: str) -> dict[str, Any]:
        """Return a section of the config, empty where it is none: a stranger's config may hold anything."""
        return _section(self.config, key)

    @property
    def is_dense(self) -> bool:
        """Whether the config has a single feed-forward network in each layer."""
        return self.section("model").get("n_experts") == 1

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages of the curriculum as the config has them, as far as they can be read."""
        stages = self.section("schedule").get("stages")
        return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, Iterable) else []

    @property
    def sources(self) -> list[str]:
        """The names of the sources, as in the config, or else as evaluated."""
        sources = self.section("data").get("sources") or ()
        return [source["name"] for source in sources if source.get("name")] or scored_sources(self.evaluations)

    def last(self, key: str) -> int:
        """Return the largest ``step`` or ``tokens_seen`` of all steps and evaluations, 0 where there is none."""
        return max((line.get(key) or 0 for line in (*self.steps, *self.evaluations)), default=0)

    def scores(self, source: str, key: str = "ce_loss") -> Series:
        """Return a value of one source at every evaluation that has it."""
        return _series(self.evaluations, str(MetricName(source, key)))

    def all_scores(self, key: str = "ce_loss") -> dict[str, Series]:
        """Return ``scores`` of every source that has any."""
        scores = {source: self.scores(source, key) for source in self.sources}
        return {source: series for source, series in scores.items() if series.is_there}

    def step_values(self, key: str) -> Series:
        """Return a value of every step that has it; steps that were skipped have no loss."""
        return _series(self.steps, key)

    def routing_values(self, key: str) -> Series:
        """Return a value by layer (n_records, L), or by layer and expert (n_records, L, E), of every recorded step."""
        return _series(self.records, "routing", key)

    def norms(self, group: str, kind: str) -> Series:
        """Return a norm of a group of parameters at every recorded step."""
        return _series(self.records, "groups", group, kind)


def _series(lines: Sequence[dict[str, Any]], *path: str) -> Series:
    """Return the values at a path of keys over tokens seen, of the lines that have one."""
    kept = [line for line in lines if _at(path, line) is not None]
    return Series(_column(kept, "tokens_seen"), _column(kept, *path))


def _column(lines: Sequence[dict[str, Any]], *path: str) -> np.ndarray:
    return np.array([_at(path, line) for line in lines], dtype=float)


def _at(path: Sequence[str], line: dict[str, Any]) -> Any:
    """Return what is at a path of keys; None where the path leads nowhere."""
    return functools.reduce(_step_into, path, line)


def _step_into(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _section(settings: dict[str, Any], key: str) -> dict[str, Any]:
    section = settings.get(key)
    return section if isinstance(section, dict) else {}


def read_run(run_dir: str | Path) -> RunRecords:
    """Read what a run's folder has.

    Raises:
        InputError: where there is no such folder, or nothing in it that a run writes.
    """
    folder, notes = Path(run_dir), list[str]()
    _check_is_run(folder)
    config = _read_config(folder / "config.yaml", notes)
    lines = _read_lines(folder / "metrics.jsonl", ("step", "tokens_seen"), notes)
    tokenizer, digest = _read_tokenizer(folder / "tokenizer.json", config, notes)
    run = RunRecords(
        name=folder.resolve().name,
        run_dir=folder,
        config=config,
        steps=[line for line in lines if "ce_loss" in line],
        records=[line for line in lines if isinstance(line.get("groups"), dict)],
        evaluations=[line for line in lines if any(key.startswith(VALIDATION) for key in line)],
        events=_read_lines(folder / "events.jsonl", ("step",), notes),
        arrays=list(_read_arrays(folder, _section(config, "model"), notes)),
        tokenizer=tokenizer,
        tokenizer_digest=digest,
        notes=notes,
    )
    if lines:
        notes += filter(None, (_missing_arrays(run), _missing_slices(run), _missing_records(run)))
    return run


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}; give one that scripts/train.py has written")
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise InputError(f"{folder} is no run: it has neither config.yaml nor metrics.jsonl")


def _missing_arrays(run: RunRecords) -> str:
    if not run.evaluations:
        return "no evaluation: the run has not reached its first"
    if not run.arrays:
        return "no arrays of evaluations (evaluations/*.safetensors): nothing about which tokens go where"
    without = {line["step"] for line in run.evaluations} - {arrays.step for arrays in run.arrays}
    steps = ", ".join(map(str, sorted(without)))
    text = f"no arrays of the evaluations after steps {steps}: what is said about experts is of other evaluations"
    return text if without else ""


def _missing_slices(run: RunRecords) -> str:
    is_lacking = run.arrays and not run.is_dense and not any(arrays.slices for arrays in run.arrays)
    text = "no experts of single tokens, and no gradients of cross entropy (train.record_tokens is 0)"
    return text if is_lacking else ""


def _missing_records(run: RunRecords) -> str:
    every = run.section("train").get("record_every_steps", "not set")
    if every == 0:
        return "no recorded steps (train.record_every_steps is 0)"
    if not run.records:
        reason = f"the run is shorter than train.record_every_steps ({every}), or from an older version"
        return f"no recorded steps: {reason}"
    has_routing = run.is_dense or any("routing" in record for record in run.records)
    return "" if has_routing else "no recorded routing, though the model has experts"


def _noted(notes: list[str], what: str, read: Callable[[], T], otherwise: T) -> T:
    """Return what can be read, or else ``otherwise``, with a note that says why."""
    try:
        return read()
    except (OSError, ValueError, yaml.YAMLError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        notes.append(f"{what}: {reason}")
        return otherwise


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    text = f"{path.name} cannot be read"
    config: Any = _noted(notes, text, lambda: yaml.safe_load(path.read_text(encoding="utf-8")), {})
    if not isinstance(config, dict):
        notes.append("config.yaml has no settings")
        return {}
    for key in [key for key in _SECTIONS if not isinstance(config.get(key, {}), dict)]:
        notes.append(f"config.yaml: {key} is no section")
        del config[key]
    sources = _section(config, "data").get("sources", [])
    if not (isinstance(sources, list) and all(isinstance(source, dict) for source in sources)):
        notes.append("config.yaml: data.sources is no list of sections")
        del config["data"]["sources"]
    return config


def _read_lines(path: Path, counts: tuple[str, ...], notes: list[str]) -> list[dict[str, Any]]:
    """Return the lines that have each of ``counts`` as an integer, and a number or null for what a report draws."""

    def is_sound(line: dict[str, Any]) -> bool:
        drawn = [value for key, value in line.items() if key in _NUMBERS or key.startswith(VALIDATION)]
        are_numbers = all(isinstance(value, int | float | None) for value in drawn)
        return are_numbers and all(isinstance(line.get(key), int) for key in counts)

    found = _noted(notes, f"{path.name} cannot be read", lambda: read_json_lines(path, is_sound), FoundLines([], 0))
    if found.n_left_out:
        n_lines = len(found.lines) + found.n_left_out
        notes.append(f"{path.name}: {found.n_left_out} of {n_lines} lines cannot be read")
    return found.lines


def _read_tokenizer(path: Path, config: dict[str, Any], notes: list[str]) -> tuple[Tokenizer | None, str | None]:
    end_of_text = _section(_section(config, "data"), "tokenizer").get("end_of_text") or END_OF_TEXT
    text = "tokenizer.json cannot be read, so tokens have no text"
    tokenizer = _noted(notes, text, lambda: Tokenizer.load(path, str(end_of_text)), None)
    return tokenizer, hashlib.sha256(path.read_bytes()).hexdigest() if tokenizer else None


def _read_arrays(folder: Path, model: dict[str, Any], notes: list[str]) -> Iterator[EvaluationArrays]:
    shape = (model.get("n_layers"), model.get("n_experts"))
    for path in sorted(folder.glob(_EVALUATION_FILES)):
        arrays = _noted(notes, f"{path.name} cannot be read", functools.partial(_load_arrays, path), None)
        if arrays and model and not arrays.have_shape(shape):
            reason = f"it has not {shape[0]} layers of {shape[1]} experts"
            notes.append(f"{path.name} is of another model, and left out: {reason}")
        elif arrays:
            yield arrays


def _load_arrays(path: Path) -> EvaluationArrays:
    arrays, by_kind = load_file(path), collections.defaultdict[str, dict[str, np.ndarray]](dict)
    for name, array in arrays.items():
        source, _, kind = name.rpartition("/")
        by_kind[kind][source] = array
    choices = by_kind["choices"]
    gradients = [arrays[name] for name in ("gradients/routers", "gradients/experts") if name in arrays]
    return EvaluationArrays(
        step=int(path.stem.removeprefix("step_")),
        nats=by_kind["nats"],
        counts=by_kind["counts"],
        tokens_per_expert=by_kind["tokens_per_expert"],
        slices={s: Slice(tokens, choices[s]) for s, tokens in by_kind["tokens"].items() if s in choices},
        gradients=Gradients(*gradients) if len(gradients) == 2 else None,
    )
