"""Runs that hold out no text: ``data.validation_fraction=0`` and configs/shakespeare.yaml."""

from __future__ import annotations

import json

import pytest
from run_scripts import command

PLAY = "".join(f"Anna:\nThe moon is up {number}.\n\nBert:\nSo it is.\n\n" for number in range(300))
SMALL = ("model.d_model=32", "model.n_layers=1", "model.d_ff=32", "schedule.warmup_tokens=500")
STAGE = 'schedule.stages=[{"until_tokens": 4096, "seq_len": 64, "batch_tokens": 512}]'


def test_all_of_one_document_is_for_training(tmp_path, monkeypatch):
    """The start says that nothing is held out, the end says how to measure other text, and that works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text(PLAY)
    (tmp_path / "val.txt").write_text(PLAY[:3000])
    run = command("train", "shakespeare.yaml", "--run-dir", "run", *SMALL, STAGE)
    assert f"plays: {len(PLAY) + 1:,} training and no held-out tokens" in " ".join(run.stdout.split())
    assert "so there is no validation loss" in " ".join(run.stdout.split())
    assert "validation at step" not in run.stdout
    assert "--files FILE" in run.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith("val/") and key.endswith("ce_loss") for line in lines for key in line)
    scored = command("evaluate", "run", "--files", "val.txt")
    assert "val.txt" in scored.stdout
    assert "64 tokens" in scored.stderr
    assert "holds out no text" in command("evaluate", "run").stderr


@pytest.mark.slow
def test_its_report_has_no_validation(tmp_path, monkeypatch):
    """And is written all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text(PLAY)
    command(
        "train",
        "shakespeare.yaml",
        "--run-dir",
        "run",
        *SMALL,
        STAGE,
        "train.record_every_steps=2",
        "train.report=true",
    )
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
