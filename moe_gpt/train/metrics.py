"""The run's diary: one JSON object per optimizer step and one per evaluation, in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from moe_gpt.train.evaluation import Score
from moe_gpt.train.schedule import StepPlan
from moe_gpt.train.step import StepMetrics


class MetricsLog:
    """Collects the metrics of several steps on the device and writes them together.

    Args:
        path: the file, appended to.
        step: lines of later steps are removed first: they are from a part of the run that is done again.
    """

    def __init__(self, path: Path, step: int) -> None:
        _keep_until(path, step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._pending: list[tuple[dict[str, Any], StepMetrics]] = []

    def add(self, step: int, tokens_seen: int, plan: StepPlan, metrics: StepMetrics) -> None:
        """Remember a step; nothing is fetched from the device yet."""
        line = {"step": step, "tokens_seen": tokens_seen, **plan._asdict()}
        self._pending.append((line, metrics))

    def write_pending(self, started_at: float) -> dict[str, Any] | None:
        """Fetch and write what was added since the last call; return the last line.

        Args:
            started_at: time.perf_counter() when the first of the steps began. The clock is read again after the
                device has delivered the values, so that work still queued there is counted.

        Every line has the mean ``tokens_per_second`` of the group: single steps are not timed on the device.
        """
        if not self._pending:
            return None
        values = torch.stack([torch.stack(metrics).float() for _, metrics in self._pending]).tolist()
        seconds = time.perf_counter() - started_at
        n_tokens = sum(line["batch_tokens"] for line, _ in self._pending)
        for (line, _), row in zip(self._pending, values, strict=True):
            line.update(zip(StepMetrics._fields, row, strict=True), tokens_per_second=n_tokens / max(seconds, 1e-9))
            line["skipped"] = bool(line["skipped"])
            self._write(line)
        self._file.flush()
        self._pending = []
        return line

    def write_scores(self, step: int, tokens_seen: int, scores: dict[str, Score]) -> None:
        """Write an evaluation."""
        line: dict[str, Any] = {"step": step, "tokens_seen": tokens_seen}
        for name, score in scores.items():
            line[f"val/{name}/ce_loss"] = score.ce_loss
            line[f"val/{name}/bits_per_byte"] = score.bits_per_byte
        self._write(line)
        self._file.flush()

    def sync(self) -> None:
        """Make sure that everything written is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        # JSON has no NaN: a value that is not finite becomes null
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(plain) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; a last line that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def scores_at(path: Path, step: int) -> dict[str, dict[str, float]]:
    """Return the evaluation after a step: per source ``ce_loss`` and ``bits_per_byte``; empty where there is none."""
    scores: dict[str, dict[str, float]] = {}
    for line in read_metrics(path) if path.is_file() else []:
        for key, value in line.items() if line["step"] == step else ():
            if key.startswith("val/") and value is not None:
                _, source, name = key.split("/")
                scores.setdefault(source, {})[name] = value
    return scores


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
