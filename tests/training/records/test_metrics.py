"""metrics.jsonl: grouped writing, JSON without NaN, trimming."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch

from moe_gpt.training.records.metrics import JsonLines, MetricsLog, read_metrics, scores_at
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import StepMetrics, StepResult

PLAN = StepPlan(seq_len=16, batch_tokens=64, lr=1e-3)


def result(loss: float, skipped: float = 0.0, **recorded) -> StepResult:
    values = dict.fromkeys(StepMetrics._fields, torch.tensor(0.5))
    metrics = StepMetrics(**{**values, "loss": torch.tensor(loss), "skipped": torch.tensor(skipped)})
    return StepResult(metrics, recorded.get("router_stats"), recorded.get("norms"))


def test_log_writes_steps_in_groups(tmp_path):
    """Nothing is written before write; every step has its own values and the group's speed."""
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    log.add(1, 64, PLAN, result(3.0))
    log.add(2, 128, PLAN, result(2.0))
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    fetched = log.fetch(time.perf_counter() - 2.0, time.process_time() - 1.0)
    log.write()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["tokens_seen"], line["loss"]) for line in lines] == [(1, 64, 3.0), (2, 128, 2.0)]
    assert fetched.steps == lines
    assert fetched.records == []
    assert lines[0]["tokens_per_second"] == pytest.approx(64, rel=0.05)
    assert sum(line["cpu_seconds"] for line in lines) == pytest.approx(1.0, rel=0.1)
    log.close()


def test_log_writes_null_for_what_is_not_finite(tmp_path):
    """Every line is JSON that any reader takes; a skipped step says so."""
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    log.add(1, 64, PLAN, result(float("nan"), skipped=1.0))
    log.fetch(time.perf_counter(), time.process_time())
    log.write()
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


def test_log_goes_back(tmp_path):
    """Rewound to a step, the lines of later ones are gone, written or not."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    for step in (1, 2, 3):
        log.add(step, 64 * step, PLAN, result(3.0))
    log.fetch(time.perf_counter(), time.process_time())
    log.write()
    log.add(4, 256, PLAN, result(3.0))
    log.rewind(2)
    log.add(3, 192, PLAN, result(2.0))
    log.fetch(time.perf_counter(), time.process_time())
    log.write()
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 3.0), (2, 3.0), (3, 2.0)]


def test_full_disk_cuts_no_line_and_loses_none(tmp_path, monkeypatch):
    """Half of a write goes through, then the disk is full, then it has room again."""
    path = tmp_path / "x.jsonl"
    log = JsonLines(path)
    log.append({"step": 1})
    log.write()
    log.append({"step": 2, "text": "long" * 20})
    real, file = log._file.write, log._file

    class Full:
        calls = 0

        def write(self, data):
            self.calls += 1
            if self.calls == 2:
                raise OSError(28, "No space left on device")
            return real(data[:10])

        def fileno(self):
            return file.fileno()

    log._file = Full()
    with pytest.raises(OSError, match="No space left"):
        log.write()
    assert path.read_text() == '{"step": 1}\n'
    log._file = file
    log.append({"step": 3})
    log.write()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    log.close()


def test_file_that_was_removed_or_replaced_is_restored(tmp_path):
    """From what is still open; what somebody else wrote is kept beside it. Without its folder it is an error."""
    path = tmp_path / "folder" / "x.jsonl"
    path.parent.mkdir()
    log = JsonLines(path)
    for step in (1, 2, 3):
        log.append({"step": step})
        log.write()
        if step < 3:
            path.unlink()
        if step == 2:  # as an editor does
            path.write_text("someone else's")
    log.append({"step": 4})
    log.write()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    (other,) = path.parent.glob("x.jsonl.replaced-*")
    assert other.read_text() == "someone else's"
    shutil.rmtree(path.parent)
    log.append({"step": 5})
    with pytest.raises(FileNotFoundError):
        log.write()
    log.close()


def test_line_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    """A process died within a line of an event."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"st')
    log = JsonLines(path)
    log.append({"step": 2})
    log.write()
    log.close()
    assert path.read_text().splitlines()[-1] == '{"step": 2}'


def test_scores_of_a_step(tmp_path):
    """Per source; none where the step was not evaluated or there is no file."""
    path = tmp_path / "metrics.jsonl"
    assert scores_at(path, 5) == {}
    path.write_text('{"step": 5, "loss": 1.0}\n{"step": 5, "val/a/ce_loss": 2.0, "val/a/bits_per_byte": 1.0}\n')
    assert scores_at(path, 5) == {"a": {"ce_loss": 2.0, "bits_per_byte": 1.0}}
    assert scores_at(path, 4) == {}
