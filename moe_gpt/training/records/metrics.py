"""The run's log: ``metrics.jsonl`` has a JSON object per optimizer step, per recording and per evaluation.

``events.jsonl`` has the rest: starts, resumes, warnings, faults. Nothing is ever removed from it.
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
    """Appends JSON lines to a file. Lines that cannot be written now are kept and written with the next ones.

    A line is in the file completely or not at all; the part that fitted on a full disk is removed again.
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
        """Write the added lines. A removed or replaced file is restored; its replacement is kept under another name.

        Raises:
            OSError: if the file cannot be written or its folder is gone; the lines are kept.
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
        """Write the file again from the open one, whose name was removed."""
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
        """Write the added lines and force them to the disk; errors are those of ``write``."""
        self.write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """Replace every non-finite number by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Fetched(NamedTuple):
    """New lines of ``metrics.jsonl``."""

    steps: list[dict[str, Any]]
    """One for each step."""
    records: list[dict[str, Any]]
    """Routing and norms of the steps that were recorded in full."""


class MetricsLog(JsonLines):
    """Collects the metrics of several steps on the device and fetches them together.

    Args:
        path: the file, appended to.
        step: lines of later steps are removed first, because those steps are done again.
    """

    def __init__(self, path: Path, step: int) -> None:
        _keep_until(path, step)
        super().__init__(path)
        self._pending: list[tuple[dict[str, Any], StepMetrics]] = []
        self._recorded: list[tuple[dict[str, Any], StepResult]] = []

    def add(self, step: int, tokens_seen: int, plan: StepPlan, result: StepResult) -> None:
        """Remember a step without fetching from the device. A step with norms is recorded in full."""
        place = {"step": step, "tokens_seen": tokens_seen}
        self._pending.append(({**result.extras, **place, **plan._asdict()}, result.metrics))
        if result.norms is not None:
            self._recorded.append((place, result))

    def fetch(self, started_at: float, cpu_at: float) -> Fetched:
        """Fetch the metrics of the steps since the last call, append their lines, and return them.

        Every line has the mean ``tokens_per_second`` and ``cpu_seconds`` of these steps, because single steps are not
        timed on the device.

        Args:
            started_at: time.perf_counter() when the first of the steps began. The clock stops when the device has
                delivered the values, so work that was still queued there counts.
            cpu_at: time.process_time() then.
        """
        if not self._pending:
            return Fetched([], [])
        lines, metrics = map(list, zip(*self._pending, strict=True))
        values = torch.stack([torch.stack(step).float() for step in metrics]).tolist()
        seconds, cpu_seconds = time.perf_counter() - started_at, (time.process_time() - cpu_at) / len(lines)
        n_tokens = sum(line["batch_tokens"] for line in lines)
        for line, row in zip(lines, values, strict=True):
            line.update(zip(StepMetrics._fields, row, strict=True), tokens_per_second=n_tokens / max(seconds, 1e-9))
            line |= {"skipped": bool(line["skipped"]), "cpu_seconds": cpu_seconds}
            self.append(line)
        records = [_record(*recorded) for recorded in self._recorded]
        for record in records:
            self.append(record)
        self._pending, self._recorded = [], []
        return Fetched(lines, records)

    def rewind(self, step: int) -> None:
        """Remove all lines of later steps, in the file and in memory."""
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
    """Return the lines of a ``metrics.jsonl`` up to the first damaged one."""
    return read_json_lines(path, lambda line: isinstance(line.get("step"), int), stops_at_damage=True).lines


def scores_at(path: Path, step: int) -> dict[str, dict[str, float]]:
    """Return the evaluation after a step: per source ``ce_loss`` and ``bits_per_byte``; empty if there is none."""
    scores: dict[str, dict[str, float]] = {}
    for line in read_metrics(path) if path.is_file() else []:
        for key, value in line.items() if line["step"] == step else ():
            name = MetricName.parse(key)
            if name and value is not None:
                scores.setdefault(name.source, {})[name.key] = value
    return scores


def _keep_until(path: Path, step: int) -> None:
    if path.is_file():
        replace_file(path, "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step))
