"""The tables of a study: table.json, table.md as table.md.jinja says it, and a page with pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moe_gpt.files.durable import replace_file
from moe_gpt.report.comparison.curves import NATS, QUANTITIES, Quantity, curves_over, draw_curves
from moe_gpt.report.comparison.runs import ComparedRun, Group
from moe_gpt.report.pictures import Picture, Table
from moe_gpt.report.report import make_section, write_page
from moe_gpt.report.words import paragraphs
from moe_gpt.studies.comparing import compare_arms, scores_of, spent_at, spreads
from moe_gpt.studies.plan import MEAN, Moment, Study
from moe_gpt.studies.prediction import told_of_law
from moe_gpt.studies.results import Row, look, names_of, of_arms
from moe_gpt.terminal.numbers import FLOPS, TIME, format_count
from moe_gpt.terminal.tables import format_table

_TEMPLATE = Path(__file__).with_name("table.md.jinja")
_COSTS = {"tokens": format_count, "flops": FLOPS.format, "cpu_seconds": TIME.format}
_CURVES = (
    *(quantity for quantity in QUANTITIES if quantity.key == "flops"),
    Quantity("cpu_seconds", "Training CPU time", TIME, "compare-cpu"),
)


def summarise(study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what table.json has."""
    scores, comparisons = scores_of(rows), study.config.comparisons
    at = {each.moment: _scores_at(rows, each.moment) for each in comparisons}
    return {
        "study": study.name,
        "machine": "; ".join(sorted({row.machine for row in rows} - {""})),
        "rows": list(map(Row.plain, rows)),
        "spread": spreads(scores),
        "comparisons": compare_arms(comparisons, at, names_of(rows, "stale")),
        "law": told_of_law(study, rows),
        "speeds": _beside(study.speeds),
        "documents": _beside(study.documents),
    }


def _beside(path: Path) -> Any:
    """Return what another command has written into the study's folder; None where it has not."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _scores_at(rows: Sequence[Row], moment: Moment) -> pd.DataFrame:
    return scores_of(rows, moment.tokens) if moment.loss is None else spent_at(rows, moment.loss)


def write_tables(study: Study, path: Path | None = None) -> tuple[list[Row], str]:
    """Write table.md, table.json and study.html where they change; return the rows, and the tables for a terminal.

    Args:
        study: as it is planned.
        path: of the JSON, OUT/table.json by default.
    """
    rows = look(study)
    told = summarise(study, rows)
    lines = _lines(study, rows, told)
    study.out.mkdir(parents=True, exist_ok=True)
    replace_if_new(path or study.out / "table.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    if replace_if_new(study.out / "table.md", "".join(map(_markdown, lines))):
        _write_page(study, rows, lines)
    tables = [format_table(table.columns, table.rows) for table in _tables(lines)[:-1]]  # without that of all runs
    return rows, "\n\n".join([*_notes(lines), *tables])


def replace_if_new(path: Path, text: str) -> bool:
    """Write a file unless it has this text; return whether it was written."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    replace_file(path, text)
    return True


def _lines(study: Study, rows: Sequence[Row], told: dict[str, Any]) -> list[str]:
    """Return the headings, paragraphs and rows of tables that the template makes."""
    scores = scores_of(rows)
    measures = [NATS.key, *(comparison.measure for comparison in study.config.comparisons)]
    pairs = scores[scores.measure.isin(measures) & (scores.source != MEAN)][["source", "measure"]].drop_duplicates()
    frame = pd.DataFrame(told["rows"]).astype(dict.fromkeys(_COSTS, float))
    facts = {
        "states": frame.state.value_counts().to_dict(),
        "names": list(pairs.itertuples(index=False, name=None)),
        "arms": frame.groupby("arm", sort=False).state.agg(list).to_dict(),
        "scores": scores.groupby(["arm", "source", "measure"]).value.agg(["mean", "std"]).to_dict("index"),
        "costs": frame[frame.counts].groupby("arm")[list(_COSTS)].agg(["mean", "count"]).to_dict("index"),
        "shown": _COSTS,
    }
    return paragraphs(_TEMPLATE.read_text(encoding="utf-8"), **told, **facts)


def _markdown(line: str) -> str:
    """Return a line with the empty lines around it that it needs."""
    return f"{line}\n" if " | " in line else f"\n{line}\n\n"


def _notes(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if " | " not in line and not line.startswith("#")]


def _tables(lines: Sequence[str]) -> list[Table]:
    """Return the tables of the template's lines, each under its heading."""
    return list(map(_table, "\n".join(lines).split("\n## ")[1:]))


def _table(text: str) -> Table:
    title, columns, _, *rows = text.splitlines()
    return Table(columns.split(" | "), [row.split(" | ") for row in rows], title)


def _write_page(study: Study, rows: Sequence[Row], lines: Sequence[str]) -> None:
    """Write study.html: the tables and pictures."""
    curves = make_section("curves", "Curves", pictures=_pictures(study, rows))
    tables = [make_section(table.title.lower(), table.title, tables=[table]) for table in _tables(lines)]
    tables[0].parts["text"] += _notes(lines)
    write_page(f"Study {study.name}", [*tables[:-1], curves, tables[-1]], study.out / "study.html")


def _pictures(study: Study, rows: Sequence[Row]) -> list[Picture]:
    """Draw the loss over FLOPs and over CPU time, with a thin line for each run; the runs of an arm look the same."""
    sources, groups = scores_of(rows).source.unique().tolist(), _groups(study, rows)
    found = [curves_over(cost, NATS, sources, groups) for cost in _CURVES]
    return [draw_curves(curves, groups) for curves in found if curves.curves]


def _groups(study: Study, rows: Sequence[Row]) -> list[Group]:
    runs = {arm: [row.records for row in of_arms(rows, arm) if row.records and row.counts] for arm in study.config.arms}
    return [Group([_named(run, arm) for run in found]) for arm, found in runs.items() if found]


def _named(run: ComparedRun, arm: str) -> ComparedRun:
    return ComparedRun(dataclasses.replace(run.records, name=arm))
