"""A study of two arms and two seeds whose runs take a fraction of a second."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_studies import train_here

from moe_gpt.studies.plan import load_study

COMPARISONS = [
    {"name": "mixture v dense", "arms": ["dense", "moe"], "claim": "lower"},
    {"name": "balance", "arms": ["dense", "moe"], "measure": "max_violation"},
]


@pytest.fixture(scope="session")
def study_values(small_values) -> dict:
    """Plain values of the study, with its base inside."""
    base = copy.deepcopy(small_values)
    base["schedule"] = {"stages": [{"until_tokens": 1024, "seq_len": 16, "batch_tokens": 128}], "warmup_tokens": 256}
    base["train"] |= {"sample_tokens": 0, "record_every_steps": 0, "eval_every_steps": 4}
    base["checkpoint"] = {"every_steps": 2}
    dense = {"overrides": ["model.n_experts=1", "model.top_k=1", "model.d_ff=64"]}
    return {"base": base, "seeds": [0, 1], "arms": {"dense": dense, "moe": {}}, "comparisons": COMPARISONS}


@pytest.fixture
def write_study(study_values, tmp_path) -> Callable[..., Path]:
    """Write the study with other keys, None for none, and with other settings of the base; return the file."""

    def write(settings: dict | None = None, **keys) -> Path:
        base = study_values["base"] | {
            name: study_values["base"].get(name, {}) | s for name, s in (settings or {}).items()
        }
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
        path = tmp_path / "study.yaml"
        values = {
            key: value for key, value in (study_values | {"base": "base.yaml"} | keys).items() if value is not None
        }
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def finished_runs(study_values, tmp_path_factory) -> Path:
    """The folder of the finished study."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "base.yaml").write_text(yaml.safe_dump(study_values["base"]), encoding="utf-8")
    (folder / "study.yaml").write_text(yaml.safe_dump(study_values | {"base": "base.yaml"}), encoding="utf-8")
    study = load_study(folder / "study.yaml", folder / "out")
    assert train_here(study) == ["finished"] * 4
    return study.out


@pytest.fixture
def out(finished_runs, tmp_path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(finished_runs, tmp_path / "out"))
