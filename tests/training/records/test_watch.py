"""Numerical faults: what is skipped, when a run goes back, what is warned of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import Listening, change, events, run_training, steps

from moe_gpt.config import FaultConfig
from moe_gpt.training.loop import pretraining_step
from moe_gpt.training.records.metrics import read_metrics
from moe_gpt.training.records.watch import HealthWatch, SpikeDetector
from moe_gpt.training.recovery import TrainingStopped, past_skipped
from moe_gpt.training.saving.checkpoint import read_state
from moe_gpt.training.saving.listing import list_checkpoints
from moe_gpt.training.saving.saved_model import load_model

TIMES = ("tokens_per_second", "cpu_seconds")


def test_single_faults_are_skipped_counted_and_located(small_config, tmp_path, poison):
    """The run goes on; the tokens count as seen; events.jsonl says where in the data the batch was."""
    poison.append(range(1500, 1501))
    display = Listening()
    run, outcome = run_training(small_config, tmp_path, display, take_step=poison.take_step)
    assert outcome == "finished"
    lines = steps(tmp_path)
    (skipped,) = [line for line in lines if line["skipped"]]
    assert skipped["ce_loss"] is None
    assert skipped["tokens_seen"] - skipped["batch_tokens"] <= 1500 < skipped["tokens_seen"]
    assert sum(line["batch_tokens"] for line in lines) == lines[-1]["tokens_seen"] == 6144
    (event,) = [event for event in events(tmp_path) if event["kind"] == "non_finite_step"]
    assert event["tokens"] == [skipped["tokens_seen"] - skipped["batch_tokens"], skipped["tokens_seen"]]
    assert event["n_sequences"] == skipped["batch_tokens"] // skipped["seq_len"] == len(event["sequences"])
    place = run.stream.locate(event["tokens"][0])
    first = event["sequences"][0]
    assert first["source"] == run.data.sources[place.source].config.name
    assert (first["document"], first["offset"]) == (place.document, place.offset)
    assert any("not finite" in text for text in display.warnings)
    assert run.state.rollbacks == 0


@pytest.mark.slow
def test_series_of_faults_goes_back_and_past_them(small_config, tmp_path, poison):
    """Back to the last checkpoint before the series; its tokens up to the third fault are never trained on."""
    config = change(change(small_config, "checkpoint", every_steps=3), "faults", max_skips_in_a_row=3)
    poison.append(range(2000, 2500))
    display = Listening()
    run, outcome = run_training(config, tmp_path, display, take_step=poison.take_step)
    assert outcome == "finished"
    assert run.state.rollbacks == 1
    ((start, end),) = run.state.skipped_windows
    assert start < 2000 < end
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, run.state.step + 1))  # each once, in order
    trained = [range(line["tokens_seen"] - line["batch_tokens"], line["tokens_seen"]) for line in lines]
    assert not any(start <= tokens.start < end for tokens in trained)
    assert lines[-1]["tokens_seen"] == 6144
    assert any("returned to step_" in text for text in display.warnings)
    assert "went_back" in [event["kind"] for event in events(tmp_path)]
    assert read_state(list_checkpoints(tmp_path)[-1])["skipped_windows"] == [[start, end]]


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [7, 11, 13])
def test_series_of_faults_ends_the_same_when_interrupted(small_config, tmp_path, poison, stop_at):
    """Stopped before, within or after the series and resumed: bit for bit the run that was not."""
    config = change(change(small_config, "checkpoint", every_steps=3), "faults", max_skips_in_a_row=3)
    poison.append(range(2000, 2500))
    run_training(config, tmp_path / "whole", take_step=poison.take_step)
    run_training(config, tmp_path / "pieces", max_steps=stop_at, take_step=poison.take_step)
    run, outcome = run_training(config, tmp_path / "pieces", resume=True, take_step=poison.take_step)
    assert (outcome, run.state.rollbacks) == ("finished", 1)
    whole, pieces = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in steps(tmp_path / name)]
        for name in ("whole", "pieces")
    )
    assert pieces == whole
    final = [list_checkpoints(tmp_path / name)[-1] for name in ("whole", "pieces")]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (final[0] / name).read_bytes() == (final[1] / name).read_bytes()


def test_run_that_never_recovers_stops_with_an_account(small_config, tmp_path, poison):
    """Every batch fails: it goes back max_rollbacks times, then says so; the good checkpoint is still there."""
    config = change(small_config, "checkpoint", every_steps=3)
    config = change(config, "faults", max_skips_in_a_row=2, max_rollbacks=2)
    poison.append(range(700, 10**9))
    with pytest.raises(TrainingStopped, match="the run returned 2 times .faults.max_rollbacks=2.*lower optimizer.lr"):
        run_training(config, tmp_path, take_step=poison.take_step)
    good = list_checkpoints(tmp_path)[0]
    assert read_state(good)["skips_in_a_row"] == 0
    assert torch.isfinite(load_model(good).model.output.weight).all()
    assert events(tmp_path)[-1]["kind"] == "stopped"


def test_faults_before_the_first_checkpoint_stop_the_run(small_config, tmp_path, poison):
    """There is nothing to go back to."""
    poison.append(range(10**9))
    config = change(small_config, "faults", max_skips_in_a_row=4)
    with pytest.raises(TrainingStopped, match="no good checkpoint to return to"):
        run_training(config, tmp_path, take_step=poison.take_step)


@pytest.mark.slow
def test_faults_up_to_the_end_finish_the_run(small_config, tmp_path, poison):
    """The window that is passed over reaches the end: the run is finished with what it had."""
    config = change(change(small_config, "checkpoint", every_steps=2), "faults", max_skips_in_a_row=2)
    poison.append(range(5000, 10**9))
    run, outcome = run_training(config, tmp_path, take_step=poison.take_step)
    assert outcome == "finished"
    assert run.state.tokens_seen == 6144
    assert "val/code/ce_loss" in read_metrics(tmp_path / "metrics.jsonl")[-1]
    again, outcome = run_training(config, tmp_path, resume=True, take_step=poison.take_step)
    assert (outcome, again.is_finished) == ("finished", True)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)).map(lambda w: (w[0], w[0] + w[1])), max_size=4),
    st.integers(0, 80),
)
def test_passing_over_windows(windows, tokens_seen):
    """The result is the nearest place not inside any window."""
    result = past_skipped(windows, tokens_seen)
    inside = {token for start, end in windows for token in range(start, end)}
    assert result == next(token for token in range(tokens_seen, 1000) if token not in inside)


def read_all(detector: SpikeDetector, losses) -> list[int]:
    lines = [{"step": step, "ce_loss": loss} for step, loss in enumerate(losses)]
    return [finding.step for line in lines for finding in detector.read(line)]


def test_spike_is_found_once():
    """Far above what was before; noise, a slow rise and a step that was skipped are none."""
    config = FaultConfig(spike_window=20, spike_deviations=6)
    noise = [3.0 + 0.1 * math.sin(step * 1.7) for step in range(100)]
    assert read_all(SpikeDetector(config), noise) == []
    assert read_all(SpikeDetector(config), [3 + 0.01 * step for step in range(100)]) == []
    assert read_all(SpikeDetector(config), noise[:50] + [5.0, 5.2, 5.1] + noise[50:]) == [50]
    assert read_all(SpikeDetector(config), noise[:10] + [9.0] + noise) == []  # nothing to compare with yet
    assert read_all(SpikeDetector(config), noise[:50] + [None, math.nan] + noise) == []


def test_spike_is_warned_of_in_a_run(small_config, tmp_path):
    """On the terminal and in events.jsonl, with what to try."""
    display = Listening()

    def take_step(run, plan, should_record):
        result = pretraining_step(run, plan, should_record)
        factor = 5.0 if run.state.step == 15 else 1.0
        return result._replace(metrics=result.metrics._replace(ce_loss=result.metrics.ce_loss * factor))

    run_training(change(small_config, "faults", spike_window=8), tmp_path, display, take_step=take_step)
    (text,) = [text for text in display.warnings if "standard deviations above the mean" in text]
    assert "at step 15" in text
    assert "lower optimizer.lr" in text
    assert "loss_spike" in [event["kind"] for event in events(tmp_path)]


def routing(loads: list[list[float]]) -> dict:
    """Return a recorded step with these loads and everything else as in a healthy router."""
    values = {"max_violation": 0.1, "router_z_loss": 7.0, "mean_probability_entropy": 1.0, "token_entropy": 0.9}
    return {"load": loads, **{name: [value] * len(loads) for name, value in values.items()}}


def test_problems_are_told_when_they_begin(small_config):
    """A dead expert, a collapsed layer, a healthy one: told once, and again when it comes back after it was well."""
    config = change(change(small_config, "model", balance="none"), "faults", routing_window=20)
    watch = HealthWatch(change(config, "train", record_every_steps=10))
    sick = routing([[1.0, 1, 1, 1], [1.4, 1.4, 1.2, 0.0], [1.9, 1.9, 0.1, 0.1]])
    healthy = routing([[1.0] * 4] * 3)

    def tell(*records) -> list[str]:
        return [finding.text for record in records for finding in watch.read([{"step": 7, "routing": record}])]

    assert tell(sick) == []  # half a window
    first = tell(sick)
    assert [text.partition(", at step")[0] for text in first] == [
        "layer 1: experts 3 of 4 are nearly unused",
        "layer 2: 2 of 4 experts get 95% of all assignments",
    ]
    assert all(text.endswith("use model.balance=loss or model.balance=bias") for text in first)
    assert tell(sick) == []
    assert tell(healthy, healthy) == []
    assert tell(sick, sick) == first


def test_dead_experts_are_warned_of_in_a_run(small_config, tmp_path):
    """Judged strictly, an untrained router uses some experts too little: the warning names the layer."""
    display = Listening()
    config = change(small_config, "model", balance="none", init_std=0.2, n_experts=8)
    config = change(change(config, "train", record_every_steps=2), "faults", routing_window=6, dead_expert_load=0.9)
    run_training(config, tmp_path, display, max_steps=6)
    assert any("are nearly unused" in text and text.startswith("layer ") for text in display.warnings)
    assert "dead_experts" in [event["kind"] for event in events(tmp_path)]


def test_dense_model_has_no_routing_to_judge(small_config, tmp_path):
    """A dense model has no layers to judge and gets no warnings."""
    display = Listening()
    config = change(change(small_config, "model", n_experts=1, top_k=1), "faults", routing_window=2)
    run_training(config, tmp_path, display, max_steps=6)
    assert display.warnings == []
