"""What is said of arms never exceeds the interval, and the law's page tells the time of its prediction."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from moe_gpt.errors import InputError
from moe_gpt.studies import prediction, statistics
from moe_gpt.studies.comparing import compare_arms, spreads
from moe_gpt.studies.plan import ComparisonConfig, Moment, load_study
from moe_gpt.studies.results import Row
from moe_gpt.studies.tables import write_tables

LOSSES = {
    "dense": [3.42, 3.433, 3.41],
    "lower": [3.36, 3.352, 3.37],
    "same": [3.42, 3.415, 3.43],
    "one": [3.0],
    "wide": [3.2, 3.63, 3.4],
}


def scores(losses: dict[str, list[float]] = LOSSES, source: str = "prose") -> pd.DataFrame:
    """Return losses as scores of runs."""
    found = [(arm, seed, source, "ce_loss", loss) for arm, values in losses.items() for seed, loss in enumerate(values)]
    return pd.DataFrame(found, columns=["arm", "seed", "source", "measure", "value"])


def compared(*arms: str, found: pd.DataFrame | None = None, **keys) -> dict:
    """Return the comparison of two arms that stands alone in its table."""
    frames = {Moment(): scores() if found is None else found}
    (entry,) = compare_arms([ComparisonConfig(name="x", arms=arms, **keys)], frames)
    return entry


@pytest.mark.parametrize(
    ("arms", "keys", "verdict"),
    [
        (("dense", "lower"), {"claim": "lower"}, "shown"),
        (("lower", "dense"), {"claim": "lower"}, "not shown (it is higher)"),
        (("lower", "dense"), {"claim": "differs"}, "shown"),
        (("dense", "same"), {"claim": "lower"}, "not shown"),
        (("dense", "same"), {"claim": "differs"}, "not shown"),
        (("dense", "same"), {"claim": "equivalent", "margin": 0.05}, "equivalent within 0.05"),
        (("dense", "same"), {"claim": "equivalent", "margin": 0.001}, "not shown"),
        (("dense", "lower"), {"claim": "equivalent", "margin": 0.01}, "not shown (it differs by more than 0.01)"),
        (("dense", "one"), {"claim": "lower"}, "open"),
        (("dense", "absent"), {"claim": "lower"}, "open"),
        (("dense", "lower"), {"claim": "lower", "source": "code"}, "open"),
    ],
)
def test_verdicts_say_no_more_than_the_interval(arms, keys, verdict):
    """Shown, not shown, equivalent within a margin, or open."""
    found = {arm: values for arm, values in LOSSES.items() if arm != "wide"}
    assert compared(*arms, found=scores(found), **keys)["verdict"] == verdict


def test_interval_is_of_the_spread_of_all_arms():
    """With one run there is a difference and no interval."""
    found = {arm: values for arm, values in LOSSES.items() if arm != "wide"}
    entry = compared("dense", "lower", found=scores(found))
    wanted = statistics.compare(LOSSES["dense"], LOSSES["lower"], statistics.pooled_spread(found))
    assert (entry["difference"], entry["interval"], entry["p"]) == wanted[:3]
    assert entry["seeds"] == [3, 3]
    assert 0 < entry["detectable"] < 0.1
    alone = compared("dense", "one")
    assert alone["difference"] == pytest.approx(-0.421)
    assert (alone["interval"], alone["p_holm"], alone["seeds"]) == (None, None, [3, 1])


def test_p_values_are_corrected_for_the_table():
    """Each claim counts with the test that decides about it."""
    claims = [
        ComparisonConfig(name="a", arms=("dense", "lower"), claim="lower"),
        ComparisonConfig(name="b", arms=("dense", "same"), claim="equivalent", margin=0.05),
        ComparisonConfig(name="c", arms=("dense", "one")),
    ]
    found = compare_arms(claims, {Moment(): scores()})
    wanted = statistics.holm([found[0]["p"], found[1]["p_equivalent"]])
    assert [entry["p_holm"] for entry in found] == [*wanted, None]


def test_arm_with_a_variance_of_its_own_gets_welch(monkeypatch):
    """The others keep the pooled spread."""
    monkeypatch.setattr(statistics, "own_variance", lambda values: {"wide"})
    assert compared("dense", "wide")["interval"] == statistics.compare(LOSSES["dense"], LOSSES["wide"]).interval
    pooled = statistics.pooled_spread(LOSSES)
    assert compared("dense", "same")["interval"] == statistics.compare(LOSSES["dense"], LOSSES["same"], pooled).interval
    assert spreads(scores())["prose/ce_loss"] == {**pooled._asdict(), "own_variance": ["wide"]}


def test_all_sources_are_compared_one_by_one():
    """A source of its own can be asked for, too."""
    found = pd.concat([scores(), scores(source="code")])
    claims = [ComparisonConfig(name="x", arms=("dense", "lower"), source=source) for source in ("all", "code")]
    assert [entry["source"] for entry in compare_arms(claims, {Moment(): found})] == ["prose", "code", "code"]


@pytest.fixture
def law_study(write_study, tmp_path, monkeypatch):
    """A study with a ladder whose runs are said to be finished; the states of single runs can be changed."""
    arms = {name: {"overrides": [f"model.n_layers={n}"]} for n, name in enumerate("abcde", 1)}
    keys = {"law": {"ladder": list("abcd"), "held_out": "e"}, "comparisons": [{"name": "x", "arms": ["a", "b"]}]}
    study = load_study(write_study(arms=arms, **keys), tmp_path / "out")
    states = {run.name: "finished" for run in study.runs if run.arm != "e"}

    def look(study) -> list[Row]:
        return [_Made(run, states.get(run.name, "missing")) for run in study.runs]

    monkeypatch.setattr(prediction, "look", look)
    monkeypatch.setattr("moe_gpt.studies.tables.look", look)
    monkeypatch.setattr("moe_gpt.studies.tables._write_page", lambda *parts: None)
    return study, states


class _Made(Row):
    """A row with the loss of a law, and a little noise."""

    @property
    def totals(self):
        return {"flops": self.run.flops} if self.counts else {}

    @property
    def scores(self):
        loss = 2 + 3 * (self.run.flops / 1e8) ** -0.3 + 0.01 * self.run.seed
        return {"prose/ce_loss": loss} if self.counts else {}

    @property
    def started_at(self):
        return "" if self.state == "missing" else "2999-01-01T00:00:00+00:00"

    @property
    def counts(self):
        return self.state == "finished"


def test_prediction_is_written_before_and_compared_after(law_study):
    """The tables have both times, and the errors of the law and of its rival."""
    study, states = law_study
    assert "not made yet" in write_tables(study)[1]
    told = prediction.write_prediction(study)
    assert json.loads(study.prediction.read_text())["digest"] == told["digest"]
    assert [point[0] for point in told["points"]] == [f"{arm}-{seed}" for arm in "abcd" for seed in (0, 1)]
    states |= {"e-0": "finished", "e-1": "finished"}
    rows, text = write_tables(study)
    law = json.loads((study.out / "table.json").read_text())["law"]
    assert law["predicted_at"] < law["started_at"]
    assert abs(law["error"]) < 0.01
    assert abs(law["error"]) < abs(law["power_law_error"])
    assert law["predicted_at"] in text
    with pytest.raises(InputError, match=r"law\.held_out: e has started"):
        prediction.write_prediction(study)


def test_no_prediction_from_half_a_ladder(law_study, write_study):
    """Nor without a law."""
    study, states = law_study
    states["b-1"] = "failed"
    with pytest.raises(InputError, match=r"law\.ladder must be finished to predict; b-1 is not"):
        prediction.write_prediction(study)
    with pytest.raises(InputError, match="law is required"):
        prediction.write_prediction(load_study(write_study()))
