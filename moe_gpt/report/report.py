"""A run's report: one page that needs nothing but itself, and a folder of the same pictures.

``write_report`` is all that others call. What a run lacks is said in its section's place; nothing here raises because
of what is in a run. matplotlib and jinja2 are imported where they are used: both take their time.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.report import expert_pictures, router_pictures, run_pictures
from moe_gpt.report.missing import attempt, need
from moe_gpt.report.pictures import Picture, Table, standalone
from moe_gpt.report.recorded import RunRecords
from moe_gpt.report.routed_text import (
    Layer,
    colour_names,
    concentration_table,
    favourite_tokens,
    routed_samples,
    show_controls,
)
from moe_gpt.report.run_summary import Finding, domain_table, perplexity, summarise
from moe_gpt.report.series import spread
from moe_gpt.report.words import paragraphs, words
from moe_gpt.terminal.numbers import format_number

_MOST_EVENTS = 200
_MOST_SAMPLES = 6
"""Generated texts shown of each source."""


class Sample(NamedTuple):
    """A generated text."""

    source: str
    step: int
    text: str


@dataclass
class Section:
    """A section of the page; whatever it has is shown in this order."""

    name: str
    title: str
    findings: list[Finding] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    favourites: list[Layer] = field(default_factory=list)
    routed: list[Layer] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    """The experts of each colour in routed text."""
    samples: list[Sample] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What could not be shown, and why."""

    def add(self, name: str, find: Callable[[RunRecords], Any], run: RunRecords) -> None:
        """Add what ``find`` returns, one thing or a list, to the list of that name, or why it is missing."""
        what = find.__name__.removeprefix("draw_").strip("_").replace("_", " ")
        found, reason = attempt(what, find, run)
        if not reason:
            getattr(self, name).extend(found if isinstance(found, list) else [found])
        elif reason not in self.missing:
            self.missing.append(reason)


def write_report(runs: Sequence[RunRecords], path: Path) -> None:
    """Write the report of a run, or of several side by side, and the folder ``<path without suffix>-pictures``.

    Each file is complete or absent; pictures of an earlier report that are not drawn again stay.

    Args:
        runs: one for a full report; of several, the comparison and each one's summary.
        path: of the HTML file, replaced if it is there.

    Raises:
        InputError: where there is no run.
        OSError: where it cannot be written.
    """
    if not runs:
        raise InputError("a report takes at least one run, got none")
    title = f"Run{'s' * (len(runs) > 1)} {', '.join(run.name for run in runs)}"
    sections = list(_sections_of_several(runs) if len(runs) > 1 else _sections_of(runs[0]))
    page = _template().render(title=title, sections=sections)
    for picture in (picture for section in sections for picture in section.pictures):
        file = path.with_name(f"{path.stem}-pictures") / picture.name
        replace_file(file.with_suffix(".svg"), standalone(picture))
        replace_file(file.with_suffix(".png"), picture.png)
    replace_file(path, page)


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    environment.tests["numeric"] = lambda value: isinstance(value, int | float | np.number)
    return environment.get_template("report.html.jinja")


def _sections_of(run: RunRecords) -> Iterator[Section]:
    """Yield the sections of one run, in the page's order."""
    yield Section("summary", words()["sections"]["summary"]["title"], findings=summarise(run))
    plan = _LEARNING | (_DENSE if run.is_dense else _ROUTING) | _REST | (_SETTINGS if run.config else {})
    for name, finds in plan.items():
        told = words()["sections"][name]
        section = Section(name, told["title"])
        for kind, functions in finds.items():
            for find in functions:
                section.add(kind, find, run)
        section.text += paragraphs(told.get("text", ""), section=section)
        yield section


def _validation_table(run: RunRecords) -> Table:
    rows = []
    for source, losses in run.all_scores().items():
        bits = dict(zip(*run.scores(source, "bits_per_byte"), strict=True))
        for tokens, loss in zip(*losses.spread(2), strict=True):
            rows.append((source, tokens, loss, perplexity(float(loss)), bits.get(tokens)))
    need(rows, "there is no evaluation, so there are no scores on held-out text")
    columns = ("source", "tokens seen", "loss (nats per token)", "perplexity", "bits per byte")
    return Table(columns, rows, "Held-out text at the first and the last evaluation")


def _pictures_of_drops(run: RunRecords) -> list[Picture]:
    has_dropped = any(line.get("dropped_fraction") for line in run.steps)
    return [router_pictures.draw_dropped(run)] if has_dropped else []


def _differences_between_sources(run: RunRecords) -> Table:
    need(len(run.counts_by_source()[0]) > 1, "there is one source of text only, so there is no domain information")
    return domain_table(run)


def _generated(run: RunRecords) -> list[Sample]:
    found = collections.defaultdict[str, list[Sample]](list)
    for line in (line for line in run.evaluations if isinstance(line.get("samples"), dict)):
        for name, text in line["samples"].items():
            found[name].append(Sample(name, line["step"], show_controls(str(text))))
    need(found, "no evaluation has kept a generated text (train.sample_tokens)")
    return [found[name][i] for name in run.in_order(found) for i in spread(len(found[name]), _MOST_SAMPLES)]


def _events(run: RunRecords) -> list[Table]:
    """Return everything that happened besides steps that went well, oldest first; no table where nothing did."""
    reason = {"kind": "skipped step", "why": "loss or gradient was not finite"}
    skipped = [{"step": line["step"], **reason} for line in run.steps if line.get("skipped")]
    events = sorted([*run.events, *skipped], key=lambda event: event["step"])
    shown = spread(len(events), _MOST_EVENTS)
    some = f" ({len(shown)} of {len(events):,}, evenly spread; events.jsonl has all)" * (len(shown) < len(events))
    rows = [_event_row(events[i]) for i in shown]
    table = Table(("time (UTC)", "step", "what", "details"), rows, f"Everything that happened besides steps{some}")
    return [table] if rows else []


def _event_row(event: dict[str, Any]) -> tuple:
    details = [
        f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in event.items()
        if key not in ("time", "step", "kind") and value not in (None, [], {}, "")
    ]
    time = str(event.get("time", "–")).replace("T", " ").split("+")[0]
    return time, event["step"], str(event.get("kind", "–")).replace("_", " "), show_controls("; ".join(details))


def _settings(run: RunRecords) -> str:
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)


_Finds = dict[str, dict[str, Sequence[Callable[[RunRecords], Any]]]]
_LEARNING: _Finds = {
    "loss": {"pictures": [run_pictures.draw_losses], "tables": [_validation_table]},
    "schedule": {"pictures": [run_pictures.draw_schedule]},
}
"""What finds the contents of sections, by the section and by its list that takes them."""
_DENSE: _Finds = {"routing": {}}
_ROUTING: _Finds = {
    "load": {"pictures": [expert_pictures.draw_load, expert_pictures.draw_load_over_training]},
    "balance": {"pictures": [router_pictures.draw_violation, router_pictures.draw_entropies]},
    "router": {"pictures": [router_pictures.draw_router, router_pictures.draw_gradients, _pictures_of_drops]},
    "saturation": {"pictures": [router_pictures.draw_saturation]},
    "pairs": {"pictures": [expert_pictures.draw_co_activation]},
    "sources": {"pictures": [expert_pictures.draw_domains], "tables": [_differences_between_sources]},
    "tokens": {"favourites": [favourite_tokens], "tables": [concentration_table]},
    "text": {"routed": [routed_samples], "colours": [colour_names]},
}
_REST: _Finds = {
    "positions": {"pictures": [run_pictures.draw_positions]},
    "samples": {"samples": [_generated]},
    "norms": {"pictures": [run_pictures.draw_norms]},
    "speed": {"pictures": [run_pictures.draw_speed]},
    "events": {"tables": [_events]},
}
_SETTINGS: _Finds = {"settings": {"settings": [_settings]}}


def _sections_of_several(runs: Sequence[RunRecords]) -> Iterator[Section]:
    """Yield the comparison, and the summary of each run."""
    from moe_gpt.report.comparison.compare import compare_runs

    comparison = compare_runs(runs)
    text = [*(picture.alt for picture in comparison.pictures), *comparison.notes]
    tables = [comparison.final.turned(), comparison.differences]
    yield Section("comparison", "Comparison", text=text, pictures=comparison.pictures, tables=tables)
    for number, run in enumerate(runs, 1):
        section = Section(f"run-{number}", f"Run {run.name}", findings=summarise(run, is_compared=True))
        section.add("tables", _validation_table, run)
        yield section
