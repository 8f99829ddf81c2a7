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
    tables = (comparisons_of, documents_of, law_of, arms_of, speeds_of, spreads_of)
    for cells in (cells for table in tables for cells in table(study)):
        yield f"| {' | '.join([study['study'], *cells])} |"


def comparisons_of(study: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each comparison."""
    for entry in study["comparisons"]:
        measure = "" if entry["measure"] == "ce_loss" else f" {entry['measure']}"
        seeds = " v ".join(map(str, entry["seeds"]))
        found = [figure(entry["difference"]), span(entry["interval"])]
        yield [entry["name"], entry["source"] + measure, *found, seeds, entry["verdict"]]


def documents_of(study: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each difference over held-out documents."""
    for entry in study.get("documents") or ():
        found = [figure(entry["difference"]), span(entry["interval"])]
        yield [entry["name"], entry["source"], *found, str(entry["documents"])]


def law_of(study: dict[str, Any]) -> Iterator[list[str]]:
    """Yield what was predicted, when, and what became of it."""
    if law := study["law"]:
        yield ["predicted", figure(law["loss"]), span(law["interval"]), law["predicted_at"]]
        yield ["by a power law without floor", figure(law["power_law"]), "-", law["predicted_at"]]
        yield ["found", figure(law["found"]), "-", law["started_at"]]


def figure(value: float | None) -> str:
    """Return a loss with four digits, and something large, such as steps, without any."""
    return "-" if value is None else f"{value:.{4 if abs(value) < 100 else 0}f}"


def span(interval: list[float] | None) -> str:
    """Return an interval, which one run does not have."""
    return "-" if interval is None else " to ".join(map(figure, interval))


def arms_of(study: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each arm: losses by source, the other measures that are compared, and CPU minutes."""
    measures = {"ce_loss", *(entry["measure"] for entry in study["comparisons"])}
    names = [name for name in study["rows"][0]["scores"] if name.rpartition("/")[2] in measures]
    for arm in dict.fromkeys(row["arm"] for row in study["rows"]):
        runs = [row for row in study["rows"] if row["arm"] == arm]
        scores = [told([run["scores"][name] for run in runs]) for name in names]
        yield [arm, str(len(runs)), *scores, f"{statistics.fmean(run['cpu_seconds'] for run in runs) / 60:.2f}"]


def told(values: list[float]) -> str:
    """Return mean and standard deviation, which one run does not have."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def spreads_of(study: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each source's noise."""
    for name, spread in study["spread"].items():
        source, _, measure = name.rpartition("/")
        if measure == "ce_loss" and source != "mean":
            seen = [f"{detectable(spread['sd'], n, n, df=spread['df']):.4f}" for n in (3, 8)]
            yield [source, f"{spread['sd']:.4f}", str(spread["df"]), *seen]


def speeds_of(study: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each arm whose speed was measured in turns."""
    for arm, found in (study["speeds"] or {}).items():
        low, high = found["interval"]
        micros = f"{1e6 * found['cpu_seconds_per_token']:.1f}"
        yield [arm, micros, f"{found['speed']:.3f}", f"{low:.3f} to {high:.3f}", str(found["rounds"])]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_figures_of_the_page_are_those_of_the_study(path):
    """And the page has no other rows of it."""
    study = json.loads(path.read_text(encoding="utf-8"))
    assert study["study"] == path.stem
    lines = (DOCS / "evidence.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(f"| {path.stem} |")] == list(rows_of(study))


@pytest.mark.parametrize("page", ["README.md", "docs/faq.md"])
def test_the_lead_that_other_pages_name_is_that_of_the_study(page):
    """Of the mixture over its dense twin, by source."""
    found = json.loads((DOCS / "evidence" / "noise.json").read_text(encoding="utf-8"))["comparisons"]
    text = " ".join((DOCS.parent / page).read_text(encoding="utf-8").split())
    for entry in found:
        low, high = (f"{-edge:.3f}" for edge in reversed(entry["interval"]))
        assert f"{-entry['difference']:.3f} nats ({low} to {high}) on {entry['source']}" in text
        assert "eight seeds against six" in text
        assert entry["seeds"] == [6, 8]


@pytest.mark.parametrize("name", ["mup", "mup-10"])
def test_slopes_of_the_page_are_those_of_the_coordinate_check(name):
    """Each with standard parametrisation and with muP."""
    found = json.loads((DOCS / "evidence" / "coordinates" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [
        f"| {name} coordinates | {output} | {slope:.2f} | {found['mup'][output]:.2f} |"
        for output, slope in found["standard"].items()
    ]
    lines = (DOCS / "evidence.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(f"| {name} coordinates |")] == rows


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_committed_study_is_one_that_is_shipped(path, tmp_path):
    """With the same arms, seeds and comparisons, and every run has come to its end."""
    study, shipped = json.loads(path.read_text(encoding="utf-8")), load_study(path.stem, tmp_path)
    assert [(row["arm"], row["seed"]) for row in study["rows"]] == [(run.arm, run.seed) for run in shipped.runs]
    assert {row["state"] for row in study["rows"]} == {"finished"}
    assert {entry["name"] for entry in study["comparisons"]} == {each.name for each in shipped.config.comparisons}
