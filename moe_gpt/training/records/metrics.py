"""The run's log: ``metrics.jsonl`` has a JSON object per optimizer step, per recording and per evaluation.

``events.jsonl`` has what happened besides: starts, resumes, warnings, faults. It is only ever appended to.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_gpt.files.durable import replace_file
from moe_gpt.files.json_lines import read_json_lines
from moe_gpt.measure.metric_names import MetricName
from moe_gpt.training.records.lines import describe_norms, describe_routing
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import StepMetrics, StepResult


class JsonLines:
    """Appends lines to a file; what cannot be written now is kept and written with the next lines.

    A line is in the file whole or not at all: what a full disk cut off is removed again.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._unwritten = path, b""
        self._open()

    def _open(self) -> None:
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":  # a process died within a line
                self._file.write(b"\n")

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; nothing is written yet."""
        self._unwritten += json.dumps(_finite(line)).encode() + b"\n"

    def write(self) -> None:
        """Write what was added. A file that was removed or replaced meanwhile is restored; another's is kept beside it.

        Raises:
            OSError: where it cannot be written, or its folder is not there any more; nothing added is lost.
        """
        if not self._path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
            self._restore()
        size = os.fstat(self._file.fileno()).st_size
        rest = memoryview(self._unwritten)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.truncate(self._file.fileno(), size)
            raise
        self._unwritten = b""

    def _restore(self) -> None:
        """Write the file anew from the one that is open, which has no name any more."""
        self._file.seek(0)
        content = self._file.read()
        if self._path.exists():
            self._path.rename(self._path.with_name(f"{self._path.name}.replaced-{time.time_ns()}"))
        if not self._path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path.parent))
        replace_file(self._path, content.decode("utf-8", errors="replace"))
        self._file.close()
        self._open()

    def sync(self) -> None:
        """Write what was added and force it to the disk.

        Raises:
            OSError: as ``write``.
        """
        self.write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """Return the value with null for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Fetched(NamedTuple):
    """The lines that were appended."""

    steps: list[dict[str, Any]]
    """One of each step."""
    records: list[dict[str, Any]]
    """What the routers did and how large weights and updates are, of the steps that were recorded."""


class MetricsLog(JsonLines):
    """Collects the metrics of several steps on the device and fetches them together.

    Args:
        path: the file, appended to.
        step: lines of later steps are removed first: they are from a part of the run that is done again.
    """

    def __init__(self, path: Path, step: int) -> None:
        _keep_until(path, step)
        super().__init__(path)
        self._pending: list[tuple[dict[str, Any], StepMetrics]] = []
        self._recorded: list[tuple[dict[str, Any], StepResult]] = []

    def add(self, step: int, tokens_seen: int, plan: StepPlan, result: StepResult) -> None:
        """Remember a step; nothing is fetched from the device yet. Where it has norms, it is recorded in full."""
        place = {"step": step, "tokens_seen": tokens_seen}
        self._pending.append(({**place, **plan._asdict()}, result.metrics))
        if result.norms is not None:
            self._recorded.append((place, result))

    def fetch(self, started_at: float) -> Fetched:
        """Fetch the metrics of the steps since the last call, append their lines, and return them.

        Args:
            started_at: time.perf_counter() when the first of the steps began. The clock is read again after the
                device has delivered the values, so that work still queued there is counted.

        Every line has the mean ``tokens_per_second`` of the group: single steps are not timed on the device.
        """
        if not self._pending:
            return Fetched([], [])
        values = torch.stack([torch.stack(metrics).float() for _, metrics in self._pending]).tolist()
        seconds = time.perf_counter() - started_at
        n_tokens = sum(line["batch_tokens"] for line, _ in self._pending)
        lines = [line for line, _ in self._pending]
        for line, row in zip(lines, values, strict=True):
            line.update(zip(StepMetrics._fields, row, strict=True), tokens_per_second=n_tokens / max(seconds, 1e-9))
            line["skipped"] = bool(line["skipped"])
            self.append(line)
        records = [_record(*recorded) for recorded in self._recorded]
        for record in records:
            self.append(record)
        self._pending, self._recorded = [], []
        return Fetched(lines, records)

    def rewind(self, step: int) -> None:
        """Remove the lines of later steps, written or not."""
        self._pending, self._recorded = [], []
        self.write()
        self._file.close()
        _keep_until(self._path, step)
        self._open()


def _record(place: dict[str, Any], result: StepResult) -> dict[str, Any]:
    record = {**place, "groups": describe_norms(result.norms or {})}
    if result.router_stats and result.sample:
        record["routing"] = describe_routing(result.router_stats, result.sample)
    return record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; what follows a damaged line is left out."""
    return read_json_lines(path, lambda line: isinstance(line.get("step"), int), stops_at_damage=True).lines


def scores_at(path: Path, step: int) -> dict[str, dict[str, float]]:
    """Return the evaluation after a step: per source ``ce_loss`` and ``bits_per_byte``; empty where there is none."""
    scores: dict[str, dict[str, float]] = {}
    for line in read_metrics(path) if path.is_file() else []:
        for key, value in line.items() if line["step"] == step else ():
            name = MetricName.parse(key)
            if name and value is not None:
                scores.setdefault(name.source, {})[name.key] = value
    return scores


def _keep_until(path: Path, step: int) -> None:
    if path.exists():
        replace_file(path, "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step))
