"""Every row of docs/evidence.md is what the committed JSON of its study says."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_gpt.studies.plan import load_study
from moe_gpt.studies.statistics import detectable

DOCS = Path(__file__).resolve().parents[1] / "docs"
STUDIES = sorted((DOCS / "evidence").glob("*.json"))


def rows_of(study: dict[str, Any]) -> Iterator[str]:
    """Yield the rows that the page must have."""
    name = study["study"]
    for entry in study["comparisons"]:
        low, high = entry["interval"]
        seeds = " v ".join(map(str, entry["seeds"]))
        cells = [f"{entry['difference']:.4f}", f"{low:.4f} to {high:.4f}", seeds, entry["verdict"]]
        yield f"| {' | '.join([name, entry['name'], entry['source'], *cells])} |"
    sources = study["spread"]["ce_loss"]
    for arm in dict.fromkeys(row["arm"] for row in study["rows"]):
        runs = [row for row in study["rows"] if row["arm"] == arm]
        scores = [[run["scores"][source]["ce_loss"] for run in runs] for source in sources]
        cells = [f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" for values in scores]
        minutes = statistics.fmean(run["cpu_seconds"] for run in runs) / 60
        cells = [str(len(runs)), *cells, f"{minutes:.2f}"]
        yield f"| {' | '.join([name, arm, *cells])} |"
    for source, spread in sources.items():
        seen = [f"{detectable(spread['sd'], n, n, df=spread['df']):.4f}" for n in (3, 8)]
        cells = [f"{spread['sd']:.4f}", str(spread["df"]), *seen]
        yield f"| {' | '.join([name, source, *cells])} |"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_figures_of_the_page_are_those_of_the_study(path):
    """And the page has no other rows of it."""
    study = json.loads(path.read_text(encoding="utf-8"))
    assert study["study"] == path.stem
    lines = (DOCS / "evidence.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(f"| {path.stem} |")] == list(rows_of(study))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_committed_study_is_one_that_is_shipped(path, tmp_path):
    """With the same arms, seeds and comparisons, and every run has come to its end."""
    study, shipped = json.loads(path.read_text(encoding="utf-8")), load_study(path.stem, tmp_path)
    assert [(row["arm"], row["seed"]) for row in study["rows"]] == [(run.arm, run.seed) for run in shipped.runs]
    assert {row["state"] for row in study["rows"]} == {"finished"}
    assert {entry["name"] for entry in study["comparisons"]} == {each.name for each in shipped.config.comparisons}
