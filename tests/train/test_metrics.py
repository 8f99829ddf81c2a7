"""metrics.jsonl: grouped writing, JSON without NaN, trimming."""

from __future__ import annotations

import json
import time

import pytest
import torch

from moe_gpt.train.metrics import MetricsLog, read_metrics
from moe_gpt.train.schedule import StepPlan
from moe_gpt.train.step import StepMetrics

PLAN = StepPlan(seq_len=16, batch_tokens=64, lr=1e-3)


def metrics(loss: float, skipped: float = 0.0) -> StepMetrics:
    values = dict.fromkeys(StepMetrics._fields, torch.tensor(0.5))
    return StepMetrics(**{**values, "loss": torch.tensor(loss), "skipped": torch.tensor(skipped)})


def test_log_writes_steps_in_groups(tmp_path):
    """Nothing is written before write_pending; then every step has its own values and the group's speed."""
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    log.add(1, 64, PLAN, metrics(3.0))
    log.add(2, 128, PLAN, metrics(2.0))
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    last = log.write_pending(time.perf_counter() - 2.0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["tokens_seen"], line["loss"]) for line in lines] == [(1, 64, 3.0), (2, 128, 2.0)]
    assert last == lines[-1]
    assert lines[0]["tokens_per_second"] == pytest.approx(64, rel=0.05)
    log.close()


def test_log_writes_null_for_what_is_not_finite(tmp_path):
    """Every line is JSON that any reader takes; a skipped step says so."""
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    log.add(1, 64, PLAN, metrics(float("nan"), skipped=1.0))
    log.write_pending(time.perf_counter())
    log.close()

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["skipped"] is True


def test_log_drops_later_and_broken_lines(tmp_path):
    """Opened at a step, it keeps the lines up to it, byte for byte, and nothing after a line that was cut off."""
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 0, "val/a/ce_loss": 5.1}\n{"step": 1, "loss": 0.1}\n'
    path.write_text(kept + '{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    MetricsLog(path, 1).close()
    assert path.read_text() == kept
