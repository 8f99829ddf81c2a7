"""A run's checkpoints: which are good, which are kept, saving in the background."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_checkpoint import make_run
from small_runs import change, run_training

from moe_gpt.config import CheckpointConfig
from moe_gpt.errors import InputError
from moe_gpt.training.saving import store as checkpoint_store
from moe_gpt.training.saving.checkpoint import load_training_state, read_state
from moe_gpt.training.saving.listing import find_good_checkpoint, list_checkpoints, verify_checkpoint
from moe_gpt.training.saving.store import (
    CheckpointSaver,
    checkpoints_not_kept,
    find_checkpoint_to_go_back_to,
    prune,
    set_aside,
)


def write_states(run_dir, states: dict[int, dict]) -> None:
    """Make folders with nothing but the state that pruning looks at."""
    common = {"format_version": 2, "tokens_seen": 0, "data_fingerprint": {}, "environment": {}}
    for step, state in states.items():
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(common | {"step": step} | state))


def steps_left(run_dir, config: CheckpointConfig) -> list[int]:
    doomed = checkpoints_not_kept(run_dir, config)
    return [int(path.name[5:]) for path in list_checkpoints(run_dir) if path not in doomed]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1, "keep_best": False}, [50]),
        ({"keep_last": 3, "keep_best": False}, [30, 40, 50]),
        ({"keep_last": 1}, [20, 50]),
        ({"keep_last": 1, "keep_every_steps": 15}, [20, 30, 50]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50]),
    ],
)
def test_policy_keeps_the_newest_the_best_and_every_nth(settings, kept, tmp_path):
    """Each of them by its own setting."""
    scores = {10: 5.0, 20: 3.0, 30: 4.0, 40: None, 50: 3.5}
    write_states(tmp_path, {step: {"score": score} for step, score in scores.items()})
    assert steps_left(tmp_path, CheckpointConfig(**settings)) == kept


def test_policy_keeps_the_one_to_go_back_to(tmp_path):
    """Newer ones were saved within a series of steps that were not finite."""
    skips = {10: 0, 20: 0, 30: 2, 40: 4}
    write_states(tmp_path, {step: {"skips_in_a_row": n} for step, n in skips.items()})
    assert steps_left(tmp_path, CheckpointConfig(keep_last=1)) == [20, 40]


def test_policy_keeps_the_scheduled_one_behind_those_of_interruptions(tmp_path):
    """A run that was interrupted goes back to the same step as one that was not."""
    write_states(tmp_path, {step: {"is_scheduled": step % 10 == 0} for step in (10, 20, 23, 27)})
    assert steps_left(tmp_path, CheckpointConfig(keep_last=2, every_steps=7)) == [20, 23, 27]


@given(
    st.dictionaries(st.integers(1, 99), st.tuples(st.none() | st.floats(1, 9), st.integers(0, 2)), min_size=1),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 7),
)
def test_policy_never_loses_what_it_promises(tmp_path_factory, states, keep_last, keep_best, every):
    """For any history: the newest, a best, every n-th and a sound one are left."""
    run_dir = tmp_path_factory.mktemp("run")
    write_states(run_dir, {step: {"score": s, "skips_in_a_row": n} for step, (s, n) in states.items()})
    settings = {"keep_last": keep_last, "keep_best": keep_best, "keep_every_steps": every}
    config = CheckpointConfig(**settings)
    left = steps_left(run_dir, config)
    assert left[-keep_last:] == sorted(states)[-keep_last:]
    scored = {step: score for step, (score, _) in states.items() if score is not None}
    if keep_best and scored:
        assert min(scored.values()) in [scored.get(step) for step in left]
    assert not every or {step for step in states if step % every == 0} <= set(left)
    ways_back = [step for step, (_, n) in states.items() if not n]
    assert not ways_back or max(ways_back) in left


def test_pruning_by_hand_never_leaves_only_damaged_ones(tmp_path):
    """The newest is damaged: the older one is not deleted."""
    state, identity = make_run()
    saver = CheckpointSaver(tmp_path, identity, CheckpointConfig(keep_last=5))
    for state.step in (1, 2):
        saver.save(state, wait=True)
    first, second = list_checkpoints(tmp_path)
    (second / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="nothing is deleted"):
        prune(tmp_path, CheckpointConfig(keep_last=1))
    assert first.exists()


def test_fallback_skips_damaged_checkpoints(tmp_path):
    """The newest good one, with the problem of each newer one; set aside, those are never found again."""
    state, identity = make_run()
    saver = CheckpointSaver(tmp_path, identity, CheckpointConfig(keep_last=5))
    for state.step in (1, 2, 3):
        saver.save(state, wait=True)
    first, second, third = list_checkpoints(tmp_path)
    (third / "manifest.json").write_text("{")
    (second / "rng.safetensors").unlink()
    good, damaged = find_good_checkpoint(tmp_path)
    assert good == first
    assert [path for path, _ in damaged] == [third, second]
    assert "manifest.json cannot be used" in damaged[0].problem
    assert "rng.safetensors is missing" in damaged[1].problem
    assert {set_aside(second).name, set_aside(third).name} == {f"step_0000000{n}.damaged-1" for n in (2, 3)}
    assert list_checkpoints(tmp_path) == [first]


def test_way_back_avoids_series_of_faults_and_damage(tmp_path):
    """Step 2 was saved within a series, step 3 is damaged."""
    state, identity = make_run()
    saver = CheckpointSaver(tmp_path, identity, CheckpointConfig(keep_last=5))
    for state.step, state.skips_in_a_row in ((1, 0), (2, 3), (3, 0)):
        saver.save(state, wait=True)
    first, _, third = list_checkpoints(tmp_path)
    (third / "config.yaml").unlink()
    assert find_checkpoint_to_go_back_to(tmp_path) == first


def test_background_save_is_of_the_moment_it_began(tmp_path, monkeypatch):
    """Training changes the weights while they are being written; the next save waits for the first."""
    state, identity = make_run()
    expected = state.model.output.weight.detach().clone()
    may_write, order = threading.Event(), []
    real = checkpoint_store.write_checkpoint

    def slow(folder, snapshot, identity):
        order.append(f"begin {folder.name}")
        assert may_write.wait(20)
        real(folder, snapshot, identity)
        order.append(f"end {folder.name}")

    monkeypatch.setattr(checkpoint_store, "write_checkpoint", slow)
    saver = CheckpointSaver(tmp_path, identity, CheckpointConfig(keep_last=5))
    began = time.perf_counter()
    saver.save(state)
    assert time.perf_counter() - began < 5  # it did not wait
    state.model.output.weight.data.add_(1)
    state.step += 1
    threading.Timer(0.2, may_write.set).start()
    saver.save(state)
    saver.wait()
    assert order == ["begin step_00000001", "end step_00000001", "begin step_00000002", "end step_00000002"]
    other, _ = make_run(1)
    load_training_state(other, list_checkpoints(tmp_path)[0])
    assert (other.model.output.weight == expected).all()


def test_background_and_foreground_write_the_same(tmp_path):
    """Saving in the background writes the same bytes as saving in the foreground."""
    state, identity = make_run()
    for name, in_background in (("a", True), ("b", False)):
        saver = CheckpointSaver(tmp_path / name, identity, CheckpointConfig(in_background=in_background))
        saver.save(state)
        saver.wait()
    first, second = (list_checkpoints(tmp_path / name)[0] for name in "ab")
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_failure_in_the_background_is_raised_later_once(tmp_path, monkeypatch):
    """By the next call; after that the saver works again."""
    state, identity = make_run()
    saver = CheckpointSaver(tmp_path, identity, CheckpointConfig())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_store, "write_checkpoint", full)
        saver.save(state)
        with pytest.raises(OSError, match="No space left"):
            saver.wait()
    saver.wait()
    saver.save(state)
    saver.wait()
    verify_checkpoint(list_checkpoints(tmp_path)[0])


def test_leftovers_of_killed_processes_go_with_the_next_save(tmp_path):
    """A half-written checkpoint does not stay for ever."""
    state, identity = make_run()
    leftover = tmp_path / "checkpoints" / "step_00000007.tmp-abc"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    CheckpointSaver(tmp_path, identity, CheckpointConfig()).save(state, wait=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.slow
def test_run_keeps_its_best_checkpoint(small_config, tmp_path):
    """The score is the mean validation loss at the step, and the best stays when it is no longer among the last."""
    config = change(small_config, "checkpoint", every_steps=4, keep_last=1)
    config = change(change(config, "train", eval_every_steps=4), "optimizer", lr=1e-2)
    run_training(config, tmp_path)
    scores = {path.name: read_state(path)["score"] for path in list_checkpoints(tmp_path)}
    assert len(scores) in (1, 2)
    assert all(score is not None for score in scores.values())
