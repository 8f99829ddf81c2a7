"""Speeds of arms: compared within rounds, so that what slows a round down slows all arms."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_gpt.bench.rounds import Turns
from moe_gpt.errors import InputError
from moe_gpt.studies import speeds
from moe_gpt.studies.plan import load_study
from moe_gpt.studies.results import look
from moe_gpt.studies.speeds import compare_speeds, write_speeds
from moe_gpt.studies.tables import summarise


def test_a_noise_of_rounds_is_not_one_of_the_ratio():
    """Rounds that take up to ten times as long tell the ratio as well as others do."""
    rng = np.random.default_rng(0)
    first = rng.uniform(1e-5, 1e-4, 30)
    found = compare_speeds({"dense": first, "moe": first / 0.8 * rng.normal(1, 0.01, 30)})
    low, high = found["moe"]["interval"]
    assert low < 0.8 < high
    assert high - low < 0.02
    assert found["dense"]["interval"] == [1.0, 1.0]
    assert found["dense"]["cpu_seconds_per_token"] == np.median(first)


def test_arms_take_turns_with_their_own_batches(write_study, tmp_path, monkeypatch):
    """Seconds are by token, of the optimizer and micro-batches of the arm; the tables then have the speeds."""
    half = {"overrides": ["schedule.stages.0.batch_tokens=64", "optimizer.name=muon"]}
    study = load_study(write_study(arms={"moe": {}, "half": half}, comparisons=None), tmp_path / "out")
    works = {}

    def take_turns(arms, build, rounds, turns, warmup, at_once, say):
        works.update(build.args[0])
        steps = [build(arm) for arm in arms]
        assert all(step() > 0 for step in steps)
        return {arm: Turns([2.0] * rounds, 0) for arm in arms}

    monkeypatch.setattr(speeds, "take_turns", take_turns)
    told = write_speeds(study, ["moe", "half"], 3)
    assert [works[arm].batch_tokens for arm in ("moe", "half")] == [128, 64]
    assert works["half"].optimizer.name == "muon"
    assert told["half"] == {"cpu_seconds_per_token": 2 / 64, "speed": 0.5, "interval": [0.5, 0.5], "rounds": 3}
    assert json.loads(json.dumps(summarise(study, look(study))))["speeds"] == told


@pytest.mark.parametrize(
    ("arms", "rounds", "text"),
    [
        (["moe", "none"], 3, "arms must be among dense, moe, got none"),
        (["moe"], 3, "two arms and two rounds, got 1 and 3"),
        (["moe", "dense"], 1, "two arms and two rounds, got 2 and 1"),
    ],
)
def test_a_comparison_that_is_none_is_refused(write_study, tmp_path, arms, rounds, text):
    """Before any process starts."""
    with pytest.raises(InputError, match=text):
        write_speeds(load_study(write_study(), tmp_path), arms, rounds)
