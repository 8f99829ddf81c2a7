"""Continuing a run under other circumstances: what is said, what is refused, what is recorded."""

from __future__ import annotations

import dataclasses
import json

import pytest
from small_runs import change, run_training

from moe_gpt.config import RunConfig, StageConfig
from moe_gpt.errors import InputError
from moe_gpt.training.saving import changes
from moe_gpt.training.saving.changes import check_changes, find_changes
from moe_gpt.training.saving.checkpoint import RunIdentity, read_state
from moe_gpt.training.saving.saved_model import resolve_checkpoint
from moe_gpt.training.setup import set_up_run

ENVIRONMENT = {"torch": "2.13.0", "code": {"model/router.py": "a", "train/step.py": "b"}, "threads": 2, "device": "cpu"}


def identity(config: RunConfig | None = None, data=None, **environment) -> RunIdentity:
    return RunIdentity(config or RunConfig(), None, data or {"prose": "1" * 64}, ENVIRONMENT | environment)


def state(**environment) -> dict:
    return {"data_fingerprint": {"prose": "1" * 64}, "environment": ENVIRONMENT | environment}


def keys(found) -> dict[str, bool]:
    return {change.key: change.needs_permission for change in found}


def test_nothing_changed():
    """A run that is continued as it was saved has no changes to report."""
    assert find_changes(RunConfig(), state(), identity()) == []
    assert check_changes([], [], print) == []


def test_settings_that_change_the_result_need_permission():
    """Those that do not are not even mentioned."""
    wanted = change(RunConfig(), "optimizer", lr=1e-4)
    wanted = change(change(wanted, "checkpoint", keep_last=9), "faults", spike_window=5)
    assert keys(find_changes(RunConfig(), state(), identity(wanted))) == {"optimizer.lr": True}


def test_data_code_and_torch_need_permission_the_machine_does_not():
    """Changes that give other results need permission; those that only round otherwise do not."""
    found = find_changes(
        RunConfig(),
        state(),
        identity(data={"prose": "2" * 64}, torch="2.14.0", threads=8, device="H100", code={"model/router.py": "c"}),
    )
    assert keys(found) == {"data.prose": True, "torch": True, "code": True, "threads": False, "device": False}
    (code,) = (change for change in found if change.key == "code")
    assert code.new == "changed in model/router.py, train/step.py"


def test_refusal_names_everything_and_the_flag():
    """One line per change, then what to add."""
    wanted = change(change(RunConfig(), "optimizer", lr=1e-4), "train", seed=5)
    with pytest.raises(InputError) as caught:
        check_changes(find_changes(RunConfig(), state(), identity(wanted)), ["train"], print)
    lines = str(caught.value).splitlines()
    assert "optimizer.lr was 0.003 and is now 0.0001" in lines
    assert "--allow-changes train,optimizer.lr;" in lines[-1]
    assert not any("seed" in line for line in lines)


def test_shape_and_tokenizer_cannot_change_whatever_is_allowed():
    """The weights would not fit; the error does not suggest a flag that cannot help."""
    wanted = change(RunConfig(), "model", n_layers=3, d_ff=48)
    with pytest.raises(InputError) as caught:
        check_changes(find_changes(RunConfig(), state(), identity(wanted)), ["model"], print)
    assert "model.n_layers was 4 and is now 3" in str(caught.value)
    assert "cannot change within a run; or start a new run with --init-from" in str(caught.value)
    assert "--allow-changes" not in str(caught.value)


def test_entries_of_a_list_are_allowed_by_the_list():
    """Stages that come and go have no values of their own to allow."""
    stages = (StageConfig(until_tokens=512, seq_len=256, batch_tokens=512), StageConfig(seq_len=256, batch_tokens=512))
    wanted = change(RunConfig(), "schedule", stages=stages)
    found = find_changes(RunConfig(), state(), identity(wanted))
    with pytest.raises(InputError, match="--allow-changes schedule.stages;"):
        check_changes(found, [], print)
    assert check_changes(found, ["schedule.stages"], lambda text: None)


def test_what_is_allowed_in_vain_is_said():
    """A key that did not change, or is misspelled."""
    said = []
    check_changes([], ["optimizer.lr"], said.append)
    (text,) = said
    assert "--allow-changes optimizer.lr had no effect" in text


def test_allowed_change_is_made_and_recorded(small_config, tmp_path):
    """In the checkpoint, for good, and in events.jsonl."""
    run_training(small_config, tmp_path, max_steps=2)
    other = change(small_config, "optimizer", lr=1e-4)
    run_training(other, tmp_path, resume=True, allow_changes=["optimizer.lr"], max_steps=4)
    run_training(other, tmp_path, resume=True, max_steps=6)  # needs no permission any more
    (record,) = read_state(resolve_checkpoint(tmp_path))["changes"]
    assert record == {"after_step": 2, "key": "optimizer.lr", "old": 0.003, "new": 0.0001, "needs_permission": True}
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["start", "first_checkpoint", "resume", "resume"]
    assert [event["changes"] for event in events if event["kind"] != "first_checkpoint"] == [[], ["optimizer.lr"], []]


def test_another_number_of_threads_goes_on_and_says_so(small_config, tmp_path, monkeypatch):
    """The data order is the same; equality to the bit is not promised."""
    run_training(small_config, tmp_path, max_steps=2)
    real = changes.describe_environment
    monkeypatch.setattr(
        "moe_gpt.training.setup.describe_environment", lambda *a: real(*a) | {"threads": 999, "processes": 2}
    )
    said: list[str] = []
    run = set_up_run(small_config, tmp_path, run_device(), resume=True, say=said.append)
    assert run.state.step == 2
    assert any("threads was" in line and "999" in line and "not bit-identically" in line for line in said)
    assert any(line.startswith("note: processes was 1 and is now 2") for line in said)


def test_changed_code_is_noticed(small_config, tmp_path, monkeypatch):
    """By the digests of the files that training computes with."""
    run_training(small_config, tmp_path, max_steps=2)
    real = changes._code_digests
    monkeypatch.setattr(changes, "_code_digests", lambda: real() | {"model/router.py": "edited"})
    with pytest.raises(InputError, match=r"code was 'another' and is now 'changed in model/router.py'"):
        run_training(small_config, tmp_path, resume=True)
    _, outcome = run_training(small_config, tmp_path, resume=True, allow_changes=["code"], max_steps=3)
    assert outcome == "max_steps"


@pytest.mark.slow
def test_schedule_may_be_extended_on_purpose(small_config, tmp_path):
    """A finished run goes on when its last stage is made longer."""
    run_training(small_config, tmp_path)
    stages = small_config.schedule.stages
    longer = (*stages[:-1], dataclasses.replace(stages[-1], until_tokens=6144 + 768))
    config = change(small_config, "schedule", stages=longer)
    run, outcome = run_training(config, tmp_path, resume=True, allow_changes=["schedule"])
    assert (outcome, run.state.tokens_seen) == ("finished", 6144 + 768)


def run_device():
    from small_runs import CPU

    return CPU
