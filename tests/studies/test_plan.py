"""The study's file: what its runs are, and what is wrong with a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_gpt.config.yaml import CONFIGS
from moe_gpt.errors import ConfigError
from moe_gpt.studies.plan import load_study

LADDER = {name: {"overrides": [f"optimizer.lr={n}e-3"]} for n, name in enumerate("abcde", 1)}


def problems_of(path: Path) -> list[str]:
    """Return the lines of the error."""
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    return caught.value.problems


def test_runs_are_arms_and_seeds(write_study, tmp_path):
    """Overrides of the study come before those of the arm; a base may be a file beside the study or a shipped one."""
    arms = {
        "a": {"overrides": ["optimizer.lr=2e-3"]},
        "b": {"base": "tiny.yaml", "seeds": [5]},
        "c": {"init_from": "a"},
    }
    path = write_study(overrides=["optimizer.lr=1e-3", "model.d_ff=64"], arms=arms, comparisons=None)
    study = load_study(path, tmp_path / "out")
    assert [run.name for run in study.runs] == ["a-0", "a-1", "b-5", "c-0", "c-1"]
    assert [(run.config.optimizer.lr, run.config.train.seed) for run in study.runs][1:3] == [(2e-3, 1), (1e-3, 5)]
    assert {run.config.model.d_ff for run in study.runs} == {64}
    assert study.runs[2].config.model.n_experts == 16
    assert [run.parent and run.parent.name for run in study.runs] == [None, None, None, "a-0", "a-1"]
    assert all(run.folder == tmp_path / "out" / run.name for run in study.runs)


def test_shipped_studies_are_found_by_name():
    """Their default folder is studies/ and the name."""
    assert [path.name for path in (CONFIGS / "studies").glob("quick*")] == ["quick.yaml"]
    assert load_study("quick").out == load_study("quick.yaml").out == Path("studies/quick")
    with pytest.raises(FileNotFoundError, match=r"no study at other.*quick\.yaml"):
        load_study("other")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"arm": {}}, "arm is not a known key; did you mean arms?"),
        ({"arms": None}, "arms is required: give a mapping with at least one entry"),
        ({"arms": {"a": {"seed": [1]}}}, "arms.a.seed is not a known key; did you mean seeds?"),
        ({"arms": {"a/b": {}}}, "arms.a/b: an arm is the name of a folder, of letters, digits, _, - and dots"),
        ({"arms": {"..": {}}}, "arms...: an arm is the name of a folder"),
        ({"seeds": [0, 0]}, "arms.dense.seeds: give each seed once, got 0 again"),
        ({"seeds": [0.5]}, "seeds must be a list of any length (each entry: a whole number from 0"),
        ({"seeds": ["x"]}, "seeds must be a list of any length (each entry: a whole number from 0"),
        ({"seeds": None}, "arms.dense.seeds is required where the study has no seeds"),
        ({"base": None}, "arms.dense.base is required where the study has no base"),
        ({"base": "nowhere.yaml"}, "arms.dense: no config at nowhere.yaml"),
        ({"overrides": ["model.d_fff=3"]}, "arms.dense: model.d_fff is not a known key"),
        ({"init_from": "moe"}, "init_from is for an arm"),
        ({"arms": {"a": {}, "b": {}}}, "arms.b has the same run as arms.a, with seed 0; give one of them"),
        ({"arms": {"a": {"init_from": "x"}}}, "arms.a.init_from must be arms of this study (a), got x"),
        ({"arms": {"a": {"init_from": "b"}, "b": {"init_from": "a"}}}, "arms.a.init_from: arms start with one another"),
        ({"arms": {"a": {"init_from": "a"}}}, "arms.a.init_from: arms start with one another in a circle: a <- a"),
        (
            {"arms": {"a": {"seeds": [1]}, "b": {"init_from": "a"}}},
            "arms.b.init_from: a needs the seeds of b, and lacks 0",
        ),
        ({"comparisons": [{"name": "x"}]}, "comparisons.0.arms is required"),
        ({"comparisons": [{"name": "x", "arms": ["moe", "dens"]}]}, "comparisons.0.arms must be arms of this study"),
        ({"comparisons": [{"name": "x", "arms": ["moe", "moe"]}]}, "comparisons.0.arms must be two different arms"),
        (
            {"comparisons": [{"name": "x", "arms": ["moe", "dense"], "claim": "equivalent"}]},
            "comparisons.0.margin is required with claim=equivalent",
        ),
        (
            {"comparisons": [{"name": "x", "arms": ["moe", "dense"], "published": {"difference": 1}}]},
            "comparisons.0.published must be a number and its origin",
        ),
        (
            {"comparisons": [{"name": "x", "arms": ["moe", "dense"], "measure": "steps"}]},
            "comparisons.0.measure must be tokens, flops, cpu_seconds, steps with at_loss and something",
        ),
        ({"law": {"ladder": ["moe", "dense"], "held_out": "moe"}}, "law.ladder must be at least 4 different arms"),
        (
            {"arms": LADDER, "law": {"ladder": ["a", "b", "c", "d"], "held_out": "a"}},
            "law.held_out must not be in the ladder that predicts it, got a",
        ),
        ({"arms": LADDER, "law": {"ladder": ["a", "b", "c", "d"], "held_out": "x"}}, "law.held_out must be arms of"),
        (
            {"coordinates": {"widths": [32], "of_arm": "x"}},
            "coordinates.of_arm must be arms of this study (dense, moe)",
        ),
    ],
)
def test_bad_studies_are_errors_that_say_what_is_right(write_study, keys, problem):
    """Each names the key, the value and the remedy."""
    comparisons = {} if "arms" not in keys else {"comparisons": None}
    found = problems_of(write_study(**comparisons | keys))
    assert any(line.startswith(problem) for line in found), found
