"""A run's report: one page that needs nothing but itself, and a folder of the same pictures.

``write_report`` is all that others call. What a run lacks is said in its section's place; nothing here raises because
of what is in a run. matplotlib and jinja2 are imported where they are used: both take their time.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.report import expert_pictures, router_pictures, run_pictures
from moe_gpt.report.missing import attempt, need
from moe_gpt.report.pictures import Picture, Table, standalone
from moe_gpt.report.recorded_routing import counts_by_source, in_order
from moe_gpt.report.routed_text import (
    Layer,
    colour_names,
    concentration_table,
    favourite_tokens,
    routed_samples,
    show_controls,
)
from moe_gpt.report.run_records import RunRecords
from moe_gpt.report.run_summary import Finding, domain_table, perplexity, summarise
from moe_gpt.report.series import spread
from moe_gpt.terminal.numbers import format_number

_MOST_EVENTS = 200
_MOST_SAMPLES = 6
"""Generated texts shown of each source."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A generated text."""

    source: str
    step: int
    text: str


@dataclasses.dataclass
class Section:
    """A section of the page; whatever it has is shown in this order."""

    name: str
    title: str
    findings: list[Finding] = dataclasses.field(default_factory=list)
    text: list[str] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    tables: list[tuple[str, Table]] = dataclasses.field(default_factory=list)
    favourites: list[Layer] = dataclasses.field(default_factory=list)
    routed: list[Layer] = dataclasses.field(default_factory=list)
    colours: list[str] = dataclasses.field(default_factory=list)
    """The experts of each colour in routed text."""
    samples: list[Sample] = dataclasses.field(default_factory=list)
    settings: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    """What could not be shown, and why."""

    def add(self, name: str, find: Callable[[RunRecords], Any], run: RunRecords) -> None:
        """Add what ``find`` returns, one thing or a list, to the list of that name, or why it is missing."""
        found, reason = attempt(find, run)
        if not reason:
            getattr(self, name).extend(found if isinstance(found, list) else [found])
        elif reason not in self.missing:
            self.missing.append(reason)


class _Plan:
    """What a section has of any run: functions that find it, by the section's lists that take it."""

    def __init__(self, name: str, title: str, **finds: Sequence[Callable[[RunRecords], Any]]) -> None:
        self.name, self.title, self.finds = name, title, finds

    def carry_out(self, run: RunRecords) -> Section:
        """Return the section of a run."""
        section = Section(self.name, self.title)
        for name, functions in self.finds.items():
            for find in functions:
                section.add(name, find, run)
        return section


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
    names = ", ".join(run.name for run in runs)
    if len(runs) == 1:
        title, sections = f"Run {names}", list(_sections_of(runs[0]))
    else:
        title, sections = f"Runs {names}", list(_sections_of_several(runs))
    page = _template().render(title=title, sections=sections)
    for section in sections:
        _write_pictures(section.pictures, path.with_name(f"{path.stem}-pictures"))
    replace_file(path, page)


def _write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    for picture in pictures:
        replace_file(folder / f"{picture.name}.svg", standalone(picture))
        replace_file(folder / f"{picture.name}.png", picture.png)


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
    yield Section("summary", "Summary", findings=summarise(run))
    routing, settings = _DENSE if run.is_dense else _ROUTING, _SETTINGS if run.config else ()
    yield from (plan.carry_out(run) for plan in (*_LEARNING, *routing, *_REST, *settings))


def _validation_table(run: RunRecords) -> tuple[str, Table]:
    rows = []
    for source, losses in run.all_scores().items():
        bits = dict(zip(*run.scores(source, "bits_per_byte"), strict=True))
        for tokens, loss in zip(*losses.spread(2), strict=True):
            rows.append((source, tokens, loss, perplexity(float(loss)), bits.get(tokens)))
    need(rows, "there is no evaluation, so there are no scores on held-out text")
    columns = ("source", "tokens seen", "loss (nats per token)", "perplexity", "bits per byte")
    return "Held-out text at the first and the last evaluation", Table(columns, rows)


def _without_routing(run: RunRecords) -> str:
    return "The model is dense: it has no experts, so there is no routing to show."


def _pictures_of_drops(run: RunRecords) -> list[Picture]:
    has_dropped = any(line.get("dropped_fraction") for line in run.steps)
    return [router_pictures.draw_dropped(run)] if has_dropped else []


def _differences_in_words(run: RunRecords) -> list[str]:
    _, counts = counts_by_source(run)
    need(len(counts) >= 2, "there is one source of text only, so there is no domain information")
    return [
        "Domain information is how much the expert of an assignment tells about the source of its token: 0 where all "
        "sources use the experts alike, 100 % where no two sources share an expert. All sources count equally.",
        "For scale: from the counts that OLMoE's authors published, with five sources, we computed 0.1 to 0.4 % for "
        "Mixtral (8 experts) and 7 to 22 % for OLMoE (64 experts).",
    ]


def _domain_tables(run: RunRecords) -> list[tuple[str, Table]]:
    return [("Domain information", domain_table(run))] if len(counts_by_source(run)[0]) > 1 else []


def _concentration(run: RunRecords) -> tuple[str, Table]:
    title = "How far the token alone, and the token before it, decide the expert (tokens that occur 10 times or more)"
    return title, concentration_table(run)


def _generated(run: RunRecords) -> list[Sample]:
    found = collections.defaultdict[str, list[Sample]](list)
    for line in (line for line in run.evaluations if isinstance(line.get("samples"), dict)):
        for name, text in line["samples"].items():
            found[name].append(Sample(name, line["step"], show_controls(str(text))))
    need(found, "no evaluation has kept a generated text (train.sample_tokens)")
    return [found[name][i] for name in in_order(run, found) for i in spread(len(found[name]), _MOST_SAMPLES)]


def _events(run: RunRecords) -> list[dict[str, Any]]:
    """Return everything that happened besides steps that went well, oldest first."""
    reason = {"kind": "skipped step", "why": "loss or gradient was not finite"}
    skipped = [{"step": line["step"], **reason} for line in run.steps if line.get("skipped")]
    return sorted([*run.events, *skipped], key=lambda event: event["step"])


def _number_of_events(run: RunRecords) -> list[str]:
    n_events = len(_events(run))
    if n_events > _MOST_EVENTS:
        return [f"{_MOST_EVENTS} of {n_events:,} events, evenly spread; events.jsonl has all."]
    return [] if n_events else ["No event is recorded."]


def _table_of_events(run: RunRecords) -> list[tuple[str, Table]]:
    events = _events(run)
    rows = [_event_row(events[i]) for i in spread(len(events), _MOST_EVENTS)]
    table = Table(("time (UTC)", "step", "what", "details"), rows)
    return [("Everything that happened besides steps", table)] if rows else []


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


_LEARNING = (
    _Plan("loss", "Loss", pictures=[run_pictures.draw_losses], tables=[_validation_table]),
    _Plan("schedule", "Schedule", pictures=[run_pictures.draw_schedule]),
)
_DENSE = (_Plan("routing", "Routing", text=[_without_routing]),)
_ROUTING = (
    _Plan("load", "Expert load", pictures=[expert_pictures.draw_load, expert_pictures.draw_load_over_training]),
    _Plan(
        "balance", "Balance and certainty", pictures=[router_pictures.draw_violation, router_pictures.draw_entropies]
    ),
    _Plan(
        "router", "Routers", pictures=[router_pictures.draw_router, router_pictures.draw_gradients, _pictures_of_drops]
    ),
    _Plan("saturation", "Saturation", pictures=[router_pictures.draw_saturation]),
    _Plan("pairs", "Pairs of experts", pictures=[expert_pictures.draw_co_activation]),
    _Plan(
        "sources",
        "Sources of text",
        pictures=[expert_pictures.draw_domains],
        text=[_differences_in_words],
        tables=[_domain_tables],
    ),
    _Plan("tokens", "Which tokens go where", favourites=[favourite_tokens], tables=[_concentration]),
    _Plan("text", "Text with its experts", routed=[routed_samples], colours=[colour_names]),
)
_REST = (
    _Plan("positions", "Loss by position", pictures=[run_pictures.draw_positions]),
    _Plan("samples", "Generated text over training", samples=[_generated]),
    _Plan("norms", "Norms", pictures=[run_pictures.draw_norms]),
    _Plan("speed", "Speed", pictures=[run_pictures.draw_speed]),
    _Plan("events", "Events", text=[_number_of_events], tables=[_table_of_events]),
)
_SETTINGS = (_Plan("settings", "Settings", settings=[_settings]),)


def _sections_of_several(runs: Sequence[RunRecords]) -> Iterator[Section]:
    """Yield the comparison, and the summary of each run."""
    from moe_gpt.report.comparison.compare import compare_runs

    comparison = compare_runs(runs)
    yield Section(
        "comparison",
        "Comparison",
        text=[*(picture.alt for picture in comparison.pictures), *comparison.notes],
        pictures=comparison.pictures,
        tables=[("At the end", _turned(comparison.final)), ("Settings that differ", comparison.differences)],
    )
    for number, run in enumerate(runs, 1):
        section = Section(f"run-{number}", f"Run {run.name}", findings=summarise(run, is_compared=True))
        section.add("tables", _validation_table, run)
        yield section


def _turned(table: Table) -> Table:
    """Return the table with its rows as columns: few runs with many numbers fit a narrow page that way."""
    headings, *rows = zip(table.columns, *table.rows, strict=True)
    return Table(headings, rows)
