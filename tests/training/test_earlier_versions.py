"""A run of version 0.1 loads, reports, exports and goes on (``tests/fixtures/run_of_version_0_1``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import run_training, steps

from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.interop import hugging_face
from moe_gpt.report import pictures
from moe_gpt.report.report import write_report
from moe_gpt.report.run_records import read_run
from moe_gpt.training.records.metrics import read_metrics
from moe_gpt.training.saving.saved_model import load_model

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "run_of_version_0_1"


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """A copy, from the folder that its config's paths are relative to."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "old" / "run"


def test_old_run_loads_and_exports(old_run, tmp_path):
    """The exported model scores text as the checkpoint's does."""
    loaded = load_model(old_run)
    assert loaded.step == 8
    hugging_face.save(loaded.model, tmp_path / "hf", loaded.tokenizer)
    tokens = torch.arange(20)[None]
    ours, theirs = loaded.model(tokens).logits, hugging_face.load(tmp_path / "hf")(tokens).logits
    torch.testing.assert_close(ours, theirs)


def test_old_run_has_a_report(old_run, tmp_path, monkeypatch):
    """Its page is drawn from the records of that version (rendering the pictures takes seconds, and is tested)."""
    monkeypatch.setattr(pictures, "render", lambda figure, name: ("<svg width='1pt' height='1pt'></svg>", b""))
    write_report([read_run(old_run)], tmp_path / "report.html")
    assert "val" in (tmp_path / "report.html").read_text()


def test_old_run_goes_on_with_permission_for_the_code(old_run):
    """It is refused without, naming code; with it the rest is what the old version did, up to rounding."""
    config = load_run_config("config.yaml")
    with pytest.raises(InputError, match="allow-changes .*code"):
        run_training(config, old_run, resume=True)
    run, outcome = run_training(config, old_run, resume=True, allow_changes=("code", "torch", "moe_gpt"))
    assert (outcome, run.state.step) == ("finished", 12)
    expected = json.loads((FIXTURE / "uninterrupted.json").read_text())
    # other CPUs round otherwise, and twelve steps of a tiny model do not blow that up
    assert [line["ce_loss"] for line in steps(old_run)] == pytest.approx(expected["ce_loss_of_each_step"], abs=2e-4)
    last = read_metrics(old_run / "metrics.jsonl")[-1]
    assert last["val/prose/ce_loss"] == pytest.approx(expected["val/prose/ce_loss"], abs=2e-4)
