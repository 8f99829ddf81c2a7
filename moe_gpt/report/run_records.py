"""Reading what a run recorded, for reports: whatever is there, and a note for what is missing or cannot be read.

It reads the run's folder alone, runs no code from it and never raises for a file that is damaged or from another
version: a report of half a run is worth more than none.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load

from moe_gpt.data.tokenizer import END_OF_TEXT, Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.inside import LARGEST_YAML, inside, read_json
from moe_gpt.files.json_lines import FoundLines, read_json_lines
from moe_gpt.interop.foreign_tokenizer import read_tokenizer
from moe_gpt.measure.health import Gradients
from moe_gpt.measure.metric_names import VALIDATION
from moe_gpt.report.recorded import EvaluationArrays, RunRecords, Slice, section_of
from moe_gpt.report.words import paragraphs, words

T = TypeVar("T")
_FILES_OF_A_RUN = ("config.yaml", "metrics.jsonl")
_SECTIONS = ("model", "data", "schedule", "train", "faults")
_NUMBERS = {"ce_loss", "loss", "lr", "seq_len", "batch_tokens", "tokens_per_second", "grad_norm"}
"""What a report draws of a step: a number or null."""


def read_run(run_dir: str | Path) -> RunRecords:
    """Read what a run's folder has.

    Raises:
        InputError: where there is no such folder, or nothing in it that a run writes; names the runs one level below.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}; give one that moe-gpt train has written")
    if not any((folder / name).exists() for name in _FILES_OF_A_RUN):
        raise InputError(f"{folder} is no run: it has neither config.yaml nor metrics.jsonl{_runs_to_give(folder)}")
    return _Reader(folder).read()


def _runs_to_give(folder: Path) -> str:
    """Return advice that names the runs inside a folder; empty where there are none."""
    inside = sorted({str(path.parent) for name in _FILES_OF_A_RUN for path in folder.glob(f"*/{name}")})
    shown = inside[:5] + [f"and {len(inside) - 5} more"] * (len(inside) > 5)
    return f"; give a run in it: {', '.join(shown)}" if inside else ""


def is_training(run_dir: Path) -> bool:
    """Tell whether a living process trains in a run's folder, which is whether it holds the lock; nothing is made.

    The lock is taken for an instant. A folder that only others may write to counts as one where nobody trains.
    """
    try:
        lock = inside(run_dir, ".lock")  # locking empties a file, also at the end of a link
        with filelock.FileLock(lock, timeout=0) if lock.is_file() else contextlib.nullcontext():
            return False
    except filelock.Timeout:
        return True
    except (OSError, InputError):
        return False


class _Reader:
    """Reads a folder, and notes what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []

    def read(self) -> RunRecords:
        """Return all that is there."""
        config = self.config()
        lines = self.lines("metrics.jsonl", "step", "tokens_seen")
        tokenizer, digest = self.tokenizer(section_of(config, "data", "tokenizer"))
        run = RunRecords(
            name=self.folder.resolve().name,
            run_dir=self.folder,
            config=config,
            steps=[line for line in lines if "ce_loss" in line],
            records=[line for line in lines if isinstance(line.get("groups"), dict)],
            evaluations=[line for line in lines if any(key.startswith(VALIDATION) for key in line)],
            events=self.lines("events.jsonl", "step"),
            arrays=list(self.arrays(section_of(config, "model"))),
            tokenizer=tokenizer,
            tokenizer_digest=digest,
            notes=self.notes,
            is_training=is_training(self.folder),
            stage_scores=self.stage_scores(),
            stage_routing=self.stage_routing(),
        )
        if lines:
            self.notes += _notes_on_gaps(run)
        return run

    def noted(self, what: str, read: Callable[[Path], T], *names: str, otherwise: T) -> T:
        """Return what can be read from a file of the folder, or else ``otherwise``, with a note that says why."""
        try:
            return read(inside(self.folder, *names))
        except (OSError, ValueError, RecursionError, yaml.YAMLError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.notes.append(f"{names[-1]} cannot be read{what}: {reason}")
            return otherwise

    def config(self) -> dict[str, Any]:
        """Return the config without the sections that are none."""
        config: Any = self.noted("", _load_yaml, "config.yaml", otherwise={})
        if not isinstance(config, dict):
            self.notes.append("config.yaml has no settings")
            return {}
        for key in [key for key in _SECTIONS if not isinstance(config.get(key, {}), dict)]:
            self.notes.append(f"config.yaml: {key} is no section")
            del config[key]
        sources = section_of(config, "data").get("sources", [])
        if not (isinstance(sources, list) and all(isinstance(source, dict) for source in sources)):
            self.notes.append("config.yaml: data.sources is no list of sections")
            del config["data"]["sources"]
        return config

    def stage_scores(self) -> dict[str, Any]:
        """Return the scores before and after a stage; none of a run that has none."""
        is_there = (self.folder / "scores.json").exists()
        return self.noted("", _load_json, "scores.json", otherwise={}) if is_there else {}

    def stage_routing(self) -> dict[str, Slice]:
        """Return the experts before and after a stage, where they are recorded."""
        files = {time: f"routing_{time}.safetensors" for time in ("before", "after")}
        found = {
            time: self.noted("", _load_slice, name, otherwise=None)
            for time, name in files.items()
            if (self.folder / name).exists()
        }
        return {time: part for time, part in found.items() if part}

    def lines(self, name: str, *counts: str) -> list[dict[str, Any]]:
        """Return the lines that have each of ``counts`` as an integer, and numbers where a report draws them."""

        def is_sound(line: dict[str, Any]) -> bool:
            drawn = [value for key, value in line.items() if key in _NUMBERS or key.startswith(VALIDATION)]
            are_numbers = all(isinstance(value, int | float | None) for value in drawn)
            return are_numbers and all(isinstance(line.get(key), int) for key in counts)

        read = functools.partial(read_json_lines, is_sound=is_sound)
        lines, n_left_out = self.noted("", read, name, otherwise=FoundLines([], 0))
        if n_left_out:
            self.notes.append(f"{name}: {n_left_out} of {len(lines) + n_left_out} lines cannot be read")
        return lines

    def tokenizer(self, settings: dict[str, Any]) -> tuple[Tokenizer | None, str | None]:
        """Return the tokenizer and its digest."""
        name, end_of_text = "tokenizer.json", str(settings.get("end_of_text") or END_OF_TEXT)
        read = functools.partial(read_tokenizer, end_of_text=end_of_text)
        tokenizer = self.noted(", so tokens have no text", read, name, otherwise=None)
        return tokenizer, hashlib.sha256((self.folder / name).read_bytes()).hexdigest() if tokenizer else None

    def arrays(self, model: dict[str, Any]) -> Iterator[EvaluationArrays]:
        """Yield the arrays of each evaluation that is of this model."""
        shape = (model.get("n_layers"), model.get("n_experts"))
        for path in sorted(self.folder.glob("evaluations/step_*.safetensors")):
            arrays = self.noted("", _load_arrays, "evaluations", path.name, otherwise=None)
            if arrays and model and any(counts.shape != shape for counts in arrays.tokens_per_expert.values()):
                reason = f"it has not {shape[0]} layers of {shape[1]} experts"
                self.notes.append(f"{path.name} is of another model, and left out: {reason}")
            elif arrays:
                yield arrays


def _load_yaml(path: Path) -> Any:
    return yaml.safe_load(inside(path.parent, path.name, at_most=LARGEST_YAML).read_text(encoding="utf-8"))


def _load_json(path: Path) -> dict[str, Any]:
    return read_json(path.parent, path.name)


def _notes_on_gaps(run: RunRecords) -> list[str]:
    without = sorted({line["step"] for line in run.evaluations} - {arrays.step for arrays in run.arrays})
    every = run.section("train").get("record_every_steps", "not set")
    return paragraphs(words()["reading"], run=run, without=without, every=every)


def _load_slice(path: Path) -> Slice | None:
    arrays = load(path.read_bytes())
    return Slice(arrays["tokens"], arrays["choices"]) if {"tokens", "choices"} <= arrays.keys() else None


def _load_arrays(path: Path) -> EvaluationArrays | None:
    arrays, by_kind = load(path.read_bytes()), collections.defaultdict[str, dict[str, np.ndarray]](dict)
    for name, array in sorted(arrays.items()):  # safetensors gives them in any order
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
