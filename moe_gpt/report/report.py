"""A run's report: one page that needs nothing but itself, and a folder of the same pictures.

``write_report`` is all that others call. What a run lacks is said in its section's place; nothing here raises because
of what is in a run. matplotlib and jinja2 are imported where they are used: both take their time.
"""

from __future__ import annotations

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
from moe_gpt.report import routing_pictures, run_pictures
from moe_gpt.report.pictures import Picture, Table, standalone
from moe_gpt.report.recorded_routing import NotRecorded, counts_by_source, in_order
from moe_gpt.report.routed_text import (
    Layer,
    colour_names,
    concentration_table,
    favourite_tokens,
    routed_samples,
    show_controls,
)
from moe_gpt.report.run_pictures import spread
from moe_gpt.report.run_records import RunRecords
from moe_gpt.report.run_summary import Answer, domain_table, is_dense, perplexity, sentence, summarise
from moe_gpt.terminal.numbers import format_number

_MOST_EVENTS = 200
_MOST_SAMPLES = 6
"""Generated texts shown of each source."""
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What unexpected values raise on their way into a picture."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A generated text."""

    source: str
    step: int
    text: str


@dataclasses.dataclass
class Part:
    """A section of the page; whatever it has is shown in this order."""

    name: str
    title: str
    answers: list[Answer] = dataclasses.field(default_factory=list)
    text: list[str] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    tables: list[tuple[str, Table]] = dataclasses.field(default_factory=list)
    favourites: list[Layer] = dataclasses.field(default_factory=list)
    routed: list[Layer] = dataclasses.field(default_factory=list)
    colours: list[str] = dataclasses.field(default_factory=list)
    """The experts of each colour in routed text."""
    samples: list[Sample] = dataclasses.field(default_factory=list)
    settings: str = ""
    missing: list[str] = dataclasses.field(default_factory=list)
    """What could not be shown, and why."""

    def add(self, name: str, find: Callable[[RunRecords], Any], run: RunRecords) -> None:
        """Add what ``find`` returns to the list of that name, or why it is missing."""
        try:
            found = find(run)
            getattr(self, name).extend(found if isinstance(found, list) else [found])
        except NotRecorded as error:
            if sentence(str(error)) not in self.missing:
                self.missing.append(sentence(str(error)))
        except _UNREADABLE as error:
            what = find.__name__.removeprefix("draw_").lstrip("_").replace("_", " ")
            self.missing.append(sentence(f"{what}; what was recorded cannot be read: {type(error).__name__}, {error}"))


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
    parts = list(_parts_of(runs[0])) if len(runs) == 1 else list(_parts_of_several(runs))
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"Runs {', '.join(run.name for run in runs)}"
    page = _template().render(title=title, parts=parts)
    folder = path.with_name(f"{path.stem}-pictures")
    for picture in (picture for part in parts for picture in part.pictures):
        replace_file(folder / f"{picture.name}.svg", standalone(picture))
        replace_file(folder / f"{picture.name}.png", picture.png)
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


def _parts_of(run: RunRecords) -> Iterator[Part]:
    """Yield the sections of one run, in the page's order."""
    yield Part("summary", "Summary", answers=summarise(run))
    loss = _drawn(run, "loss", "Loss", run_pictures.draw_losses)
    loss.add("tables", _validation_table, run)
    yield loss
    yield _drawn(run, "schedule", "Schedule", run_pictures.draw_schedule)
    if is_dense(run):
        yield Part(
            "routing", "Routing", text=["The model is dense: it has no experts, so there is no routing to show."]
        )
    else:
        yield from _parts_of_routing(run)
    yield _drawn(run, "positions", "Loss by position", run_pictures.draw_positions)
    samples = Part("samples", "Generated text over training")
    samples.add("samples", _generated, run)
    yield samples
    yield _drawn(run, "norms", "Norms", run_pictures.draw_norms)
    yield _drawn(run, "speed", "Speed", run_pictures.draw_speed)
    yield _events(run)
    if run.config:
        yield Part("settings", "Settings", settings=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))


def _parts_of_routing(run: RunRecords) -> Iterator[Part]:
    drawn = routing_pictures
    yield _drawn(run, "load", "Expert load", drawn.draw_load, drawn.draw_load_over_training)
    yield _drawn(run, "balance", "Balance and certainty", drawn.draw_violation, drawn.draw_entropies)
    router = _drawn(run, "router", "Routers", drawn.draw_router, drawn.draw_gradients)
    if any(line.get("dropped_fraction") for line in run.steps):
        router.add("pictures", drawn.draw_dropped, run)
    yield router
    yield _drawn(run, "saturation", "Saturation", drawn.draw_saturation)
    yield _drawn(run, "pairs", "Pairs of experts", drawn.draw_co_activation)
    sources = _drawn(run, "sources", "Sources of text", drawn.draw_domains)
    sources.add("text", _differences_in_words, run)
    sources.add("tables", _domain_tables, run)
    yield sources
    words = Part("tokens", "Which tokens go where")
    words.add("favourites", favourite_tokens, run)
    words.add("tables", _concentration, run)
    yield words
    text = Part("text", "Text with its experts")
    text.add("routed", routed_samples, run)
    text.add("colours", colour_names, run)
    yield text


def _drawn(run: RunRecords, name: str, title: str, *draws: Callable[[RunRecords], Picture]) -> Part:
    part = Part(name, title)
    for draw in draws:
        part.add("pictures", draw, run)
    return part


def _validation_table(run: RunRecords) -> tuple[str, Table]:
    rows = []
    for source in run.sources:
        tokens, losses = run.scores(source)
        _, bits = run.scores(source, "bits_per_byte")
        for place in dict.fromkeys((0, len(losses) - 1)) if len(losses) else ():
            per_byte = bits[place] if len(bits) == len(losses) else None
            rows.append((source, tokens[place], losses[place], perplexity(float(losses[place])), per_byte))
    if not rows:
        raise NotRecorded("there is no evaluation, so there are no scores on held-out text")
    columns = ("source", "tokens seen", "loss (nats per token)", "perplexity", "bits per byte")
    return "Held-out text at the first and the last evaluation", Table(columns, rows)


def _differences_in_words(run: RunRecords) -> list[str]:
    _, counts = counts_by_source(run)
    if len(counts) < 2:
        raise NotRecorded("there is one source of text only, so there is no domain information")
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
    lines = [line for line in run.evaluations if isinstance(line.get("samples"), dict) and line["samples"]]
    if not lines:
        raise NotRecorded("no evaluation has kept a generated text (train.sample_tokens)")
    names = in_order(run, dict.fromkeys(name for line in lines for name in line["samples"]))
    samples = []
    for name in names:
        of_source = [line for line in lines if name in line["samples"]]
        for line in (of_source[i] for i in spread(len(of_source), _MOST_SAMPLES)):
            samples.append(Sample(name, line["step"], show_controls(str(line["samples"][name]))))
    return samples


def _events(run: RunRecords) -> Part:
    part = Part("events", "Events")
    skipped = [
        {"step": line["step"], "kind": "skipped step", "why": "loss or gradient was not finite"}
        for line in run.steps
        if line.get("skipped")
    ]
    events = sorted([*run.events, *skipped], key=lambda event: event["step"])
    if not events:
        part.text.append("No event is recorded.")
        return part
    shown = spread(len(events), _MOST_EVENTS)
    if len(shown) < len(events):
        part.text.append(f"{len(shown)} of {len(events):,} events, evenly spread; events.jsonl has all.")
    rows = [_event_row(events[i]) for i in shown]
    part.tables.append(
        ("Everything that happened besides steps", Table(("time (UTC)", "step", "what", "details"), rows))
    )
    return part


def _event_row(event: dict[str, Any]) -> tuple:
    details = [
        f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in event.items()
        if key not in ("time", "step", "kind") and value not in (None, [], {}, "")
    ]
    time = str(event.get("time", "–")).replace("T", " ").split("+")[0]
    return time, event["step"], str(event.get("kind", "–")).replace("_", " "), show_controls("; ".join(details))


def _parts_of_several(runs: Sequence[RunRecords]) -> Iterator[Part]:
    """Yield the comparison, and the summary of each run."""
    from moe_gpt.report.comparison import compare_runs

    comparison = compare_runs(runs)
    yield Part(
        "comparison",
        "Comparison",
        text=[*(picture.alt for picture in comparison.pictures), *comparison.notes],
        pictures=comparison.pictures,
        tables=[("At the end", _turned(comparison.final)), ("Settings that differ", comparison.differences)],
    )
    for number, run in enumerate(runs, 1):
        part = Part(f"run-{number}", f"Run {run.name}", answers=summarise(run, is_compared=True))
        part.add("tables", _validation_table, run)
        yield part


def _turned(table: Table) -> Table:
    """Return the table with its rows as columns: few runs with many numbers fit a narrow page that way."""
    first, *others = table.columns
    rows = [(name, *(row[place] for row in table.rows)) for place, name in enumerate(others, 1)]
    return Table((first, *(row[0] for row in table.rows)), rows)
