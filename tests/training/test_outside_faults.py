"""What the machine does to a run: full disks, vanished folders, no memory, a clock that jumps."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time

import pytest
import torch
from small_runs import Listening, Silent, change, events, run_training, steps, whole_run

from moe_gpt.data import prepare
from moe_gpt.errors import InputError
from moe_gpt.files import durable
from moe_gpt.files import tensors as tensor_files
from moe_gpt.training.loop import pretraining_step
from moe_gpt.training.optimizer import Optimizer
from moe_gpt.training.records import metrics
from moe_gpt.training.recovery import TrainingStopped
from moe_gpt.training.saving import write
from moe_gpt.training.saving.listing import list_checkpoints
from moe_gpt.training.saving.saved_model import load_model


def weights(run_dir) -> bytes:
    return (list_checkpoints(run_dir)[-1] / "model.safetensors").read_bytes()


@pytest.fixture
def full_disk(monkeypatch):
    """A switch that makes the one place that writes whole files fail, as a full disk does."""
    real = durable.write_file
    disk = {"is_full": False}

    def write_file(path, chunks):
        if disk["is_full"]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, chunks)

    for module in (durable, write, tensor_files):
        monkeypatch.setattr(module, "write_file", write_file)
    return disk


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode there")
def test_a_run_folder_whose_name_is_not_utf8_is_refused_before_training(small_config, tmp_path):
    """Its weights could be written and not be read again; the remedy is said where such a folder is read, too."""
    odd = tmp_path / os.fsdecode(b"run\xff\xfe")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"--run-dir .*\\udcff.* is not UTF-8 text; rename .* choose another"):
            run_training(small_config, odd, resume=resume)
    assert not odd.exists()
    try:
        shutil.copytree(whole_run(small_config), odd)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    with pytest.raises(InputError, match="is not UTF-8 text; rename the folder"):
        load_model(odd)


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [True, False])
def test_disk_that_is_full_for_a_while_costs_checkpoints_only(small_config, tmp_path, full_disk, in_background):
    """Training goes on, warns, and saves again when there is room; the result is the same."""
    config = change(small_config, "checkpoint", every_steps=4, in_background=in_background)
    plain = whole_run(config)

    class Filling(Listening):
        def progress(self, tokens_seen, line):
            full_disk["is_full"] = 6 <= line["step"] < 14

    display = Filling()
    _, outcome = run_training(config, tmp_path / "full", display)
    assert outcome == "finished"
    assert any("No space left on device" in text for text in display.warnings)
    assert weights(tmp_path / "full") == weights(plain)
    assert "cannot_save" in [event["kind"] for event in events(tmp_path / "full")]


@pytest.mark.slow
def test_last_step_that_cannot_be_saved_is_an_error(small_config, tmp_path, full_disk):
    """It says which checkpoint there is; --resume then does the rest again."""
    config = change(small_config, "checkpoint", every_steps=10)

    class Filling(Silent):
        def progress(self, tokens_seen, line):
            full_disk["is_full"] = line["step"] > 12

    with pytest.raises(TrainingStopped, match=r"step 2\d could not be saved: .*No space left.*step_00000010"):
        run_training(config, tmp_path, Filling())
    full_disk["is_full"] = False
    _, outcome = run_training(config, tmp_path, resume=True)
    assert outcome == "finished"


@pytest.mark.slow
def test_metrics_wait_for_room_and_checkpoints_for_metrics(small_config, tmp_path, monkeypatch):
    """Lines that cannot be written are kept; no checkpoint is saved that is ahead of its metrics."""
    config = change(small_config, "checkpoint", every_steps=4)
    real, state = metrics.MetricsLog.write, {"step": 0}

    def write(self):
        if 6 <= state["step"] < 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(metrics.MetricsLog, "write", write)
    saved_meanwhile = []

    class Watching(Listening):
        def progress(self, tokens_seen, line):
            state["step"] = line["step"]
            if 6 < line["step"] < 15:
                saved_meanwhile.extend(path.name for path in list_checkpoints(tmp_path))

    display = Watching()
    run, outcome = run_training(config, tmp_path, display)
    assert outcome == "finished"
    assert set(saved_meanwhile) <= {"step_00000004"}
    assert [line["step"] for line in steps(tmp_path)] == list(range(1, run.state.step + 1))
    assert sum("metrics cannot be written" in text for text in display.warnings) == 1


def test_run_folder_that_is_removed_stops_the_run_with_a_checkpoint(small_config, tmp_path):
    """Written anew; the account says that the rest is gone."""

    class Removing(Silent):
        def progress(self, tokens_seen, line):
            if line["step"] == 9:
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(TrainingStopped, match="was removed during training.*the newest checkpoint is"):
        run_training(small_config, tmp_path / "run", Removing())
    assert load_model(tmp_path / "run").step == 12


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), marks=pytest.mark.slow),
        pytest.param(MemoryError(), marks=pytest.mark.slow),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_names_the_setting_and_saves(small_config, tmp_path, error):
    """The weights after the last step are saved; resumed, the run ends as if nothing had happened."""
    plain = whole_run(small_config)

    def take_step(run, plan, should_record):
        if run.state.step == 8:
            raise error
        return pretraining_step(run, plan, should_record)

    with pytest.raises(TrainingStopped, match=r"out of memory in step 9 .*lower train.micro_batch_tokens .now 192"):
        run_training(small_config, tmp_path / "run", take_step=take_step)
    assert load_model(tmp_path / "run").step == 8
    run_training(small_config, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(plain)


def test_weights_that_are_neither_old_nor_new_are_not_saved(small_config, tmp_path, monkeypatch):
    """Memory ran out while the optimizer was at work: the checkpoint before it stays the newest."""

    def run_out(*_):
        raise MemoryError

    config = change(small_config, "checkpoint", every_steps=3)
    real, n_steps = Optimizer.step, []

    def step(self, *arguments):
        n_steps.append(1)
        return run_out() if len(n_steps) == 8 else real(self, *arguments)

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(TrainingStopped, match="the newest checkpoint is .*step_00000006"):
        run_training(config, tmp_path)


def test_other_errors_are_not_taken_for_memory(small_config, tmp_path):
    """A mistake in the code stays visible as one."""

    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_training(small_config, tmp_path, take_step=broken)


@pytest.mark.slow
def test_clock_that_jumps_changes_nothing(small_config, tmp_path, monkeypatch):
    """An hour back, a day ahead: neither the limit on minutes nor the results notice."""
    plain = whole_run(small_config)
    real, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-3600, 86_400)[next(jumps) % 2])
    _, outcome = run_training(small_config, tmp_path / "jumps", max_minutes=60)
    assert outcome == "finished"
    assert weights(tmp_path / "jumps") == weights(plain)


def test_disk_full_while_tokenising_is_one_line_and_leaves_nothing(small_config, tmp_path, monkeypatch):
    """The message names the cache; with room again the same run works."""
    config = change(small_config, "data", cache_dir=str(tmp_path / "cache"))
    real = prepare.build_store

    def full(name, documents, tokenizer, folder, *rest):
        def failing():
            yield from list(documents)[:2]
            raise OSError(errno.ENOSPC, "No space left on device")

        real(name, failing(), tokenizer, folder, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "build_store", full)
        with pytest.raises(OSError, match="No space left on device"):
            run_training(config, tmp_path / "run")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert run_training(config, tmp_path / "run", max_steps=1)[1] == "max_steps"


def test_events_have_a_time_a_kind_and_a_step(small_config, tmp_path):
    """Every line, for whoever reads them later."""
    run_training(small_config, tmp_path, max_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert all({"time", "kind", "step"} <= line.keys() for line in lines)


@pytest.mark.slow
def test_metrics_that_somebody_removed_come_back(small_config, tmp_path):
    """Deleted in mid-run, the file is written anew, whole; saving goes on."""
    plain = whole_run(small_config)

    class Removing(Listening):
        def progress(self, tokens_seen, line):
            if line["step"] == 9:
                (tmp_path / "run" / "metrics.jsonl").unlink()

    run, outcome = run_training(small_config, tmp_path / "run", Removing())
    assert outcome == "finished"
    assert [line["step"] for line in steps(tmp_path / "run")] == list(range(1, run.state.step + 1))
    assert weights(tmp_path / "run") == weights(plain)


def test_metrics_with_holes_are_said_at_resume(small_config, tmp_path):
    """The run goes on; what is missing is counted."""
    run_training(small_config, tmp_path, max_steps=6)
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"step": 3,' not in line) + "\n")
    display = Listening()
    run_training(small_config, tmp_path, display, resume=True, max_steps=8)
    assert display.warnings == ["metrics.jsonl lacks 1 of the 6 completed steps; the run continues"]


def test_run_whose_checkpoints_vanished_is_not_started_over(small_config, tmp_path):
    """events.jsonl knows that there were some; a run that never saved one does start over."""
    config = change(small_config, "checkpoint", every_steps=2)
    run_training(config, tmp_path / "run", max_steps=9)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="had checkpoints, .*run/checkpoints now has none"):
        run_training(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "events.jsonl").write_text('{"kind": "start"}\n')
    assert run_training(config, tmp_path / "young", resume=True, max_steps=1)[1] == "max_steps"


@pytest.mark.slow
def test_way_back_survives_another_interval(small_config, tmp_path, poison):
    """What was scheduled when it was saved stays a place to go back to."""
    config = change(change(small_config, "checkpoint", every_steps=4), "faults", max_skips_in_a_row=2)
    run_training(config, tmp_path, max_steps=8, take_step=poison.take_step)
    poison.append(range(2000, 2500))
    run, outcome = run_training(
        change(config, "checkpoint", every_steps=100), tmp_path, resume=True, take_step=poison.take_step
    )
    assert outcome == "finished"
    assert run.state.rollbacks > 0


@pytest.mark.slow
def test_stopped_run_leaves_metrics_and_the_good_checkpoint(small_config, tmp_path, poison):
    """Every step that was done has its line and its event; what was saved within the series is set aside."""
    config = change(change(small_config, "checkpoint", every_steps=1, keep_last=2), "train", log_every_steps=1)
    config = change(config, "faults", max_skips_in_a_row=3, max_rollbacks=0)
    poison.append(range(1000, 10**9))
    with pytest.raises(
        TrainingStopped, match="3 steps in a row .*non-finite.*up to step 10.*the newest checkpoint is .*07"
    ):
        run_training(config, tmp_path, take_step=poison.take_step)
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert sum(event["kind"] == "non_finite_step" for event in events(tmp_path)) == 3
    poison.clear()
    run, outcome = run_training(config, tmp_path, resume=True, take_step=poison.take_step)
    assert outcome == "finished"
    assert run.state.rollbacks == 0
