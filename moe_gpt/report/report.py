"""A run's report: one page that needs nothing but itself, and a folder of the same pictures.

``write_report`` is all that others call. What a run lacks is said in its section's place; nothing here raises because
of what is in a run. matplotlib and jinja2 are imported where they are used: both take their time.
"""

from __future__ import annotations

import collections
import functools
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.report.missing import attempt
from moe_gpt.report.pictures import standalone
from moe_gpt.report.recorded import RunRecords, tell_apart
from moe_gpt.report.routed_text import show_controls
from moe_gpt.report.run_summary import summarise
from moe_gpt.report.run_tables import validation_table
from moe_gpt.report.series import spread
from moe_gpt.report.words import Glossary, paragraphs, words
from moe_gpt.terminal.numbers import format_number


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    name: str
    title: str
    parts: dict[str, list] = field(default_factory=lambda: collections.defaultdict(list))
    """What it has, by the names that report.html.jinja uses; ``missing`` says what could not be shown, and why."""

    def add(self, part: str, find: Callable[[Any], Any], run: RunRecords | list[RunRecords]) -> None:
        """Add what ``find`` returns, one thing or a list, to a part, or why it is missing."""
        what = find.__name__.removeprefix("draw_").strip("_").replace("_", " ")
        found, reason = attempt(what, find, run)
        if not reason:
            self.parts[part].extend(found if isinstance(found, list) else [found])
        elif reason not in self.parts["missing"]:
            self.parts["missing"].append(reason)


def write_report(runs: Sequence[RunRecords], path: Path, renew_seconds: int = 0) -> None:
    """Write the report of a run, or of several side by side, and the folder ``<path without suffix>-pictures``.

    Each file is complete or absent; pictures of an earlier report that are not drawn again stay.

    Args:
        runs: one for a full report; of several, the comparison and each one's summary.
        path: of the HTML file, replaced if it is there.
        renew_seconds: how often a browser loads the page anew; 0 for a page that does not change any more.

    Raises:
        InputError: where there is no run.
        OSError: where it cannot be written.
    """
    if not runs:
        raise InputError("a report takes at least one run, got none")
    runs = tell_apart(runs)
    sections = list(_sections_of_several(runs) if len(runs) > 1 else _sections_of(runs[0]))
    write_page(f"Run{'s' * (len(runs) > 1)} {', '.join(run.name for run in runs)}", sections, path, renew_seconds)


def write_page(title: str, sections: Sequence[Section], path: Path, renew_seconds: int = 0) -> None:
    """Write a page of sections, and their pictures; arguments and errors are those of ``write_report``."""
    facts = {"title": title, "sections": sections, "renew_seconds": renew_seconds, "glossary": Glossary()}
    page = _template().render(facts)
    for picture in itertools.chain(*(section.parts["pictures"] for section in sections)):
        file = path.with_name(f"{path.stem}-pictures") / picture.name
        replace_file(file.with_suffix(".svg"), standalone(picture))
        replace_file(file.with_suffix(".png"), picture.png)
    replace_file(path, page.encode("utf-8", "backslashreplace"))  # a path may be no UTF-8


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
    environment.filters |= {"number": format_number, "controls": show_controls, "spread": _spread_over}
    environment.filters["json"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.tests["numeric"] = lambda value: isinstance(value, int | float | np.number)
    return environment.get_template("report.html.jinja")


def _spread_over(values: Sequence[Any], limit: int) -> list[Any]:
    return [values[place] for place in spread(len(values), limit)]


def _sections_of(run: RunRecords) -> Iterator[Section]:
    """Yield the sections of one run, as words.yaml describes them."""
    has = {None: True, "dense": run.is_dense, "experts": run.shows_experts, "config": bool(run.config)}
    has |= {
        "tuned": run.stage is not None,
        "text": run.stage != "reward",
        "rl": run.stage == "rl",
        "sees": run.stage == "see",
    }
    has |= {"pairs": run.stage in ("reward", "dpo"), "tuned_experts": run.stage is not None and not run.is_dense}
    has |= {"records": run.records_steps, "sampled": not run.stage or bool(run.section("train").get("sample_tokens"))}
    for name, told in words()["sections"].items():
        if has[told.get("only")]:
            section = Section(name, told["title"])
            for part, place, *needed in told.get("has", ()):
                if not all(has[condition] for condition in needed):
                    continue
                module, _, function = place.partition(".")
                section.add(part, getattr(importlib.import_module(f"moe_gpt.report.{module}"), function), run)
            section.parts["text"] += paragraphs(told.get("text", ""), has=section.parts)
            yield section


def _sections_of_several(runs: Sequence[RunRecords]) -> Iterator[Section]:
    """Yield the comparison, and the summary of each run."""
    from moe_gpt.report.comparison.compare import compare_runs

    found = compare_runs(runs)
    yield make_section("comparison", "At the end", tables=[found.final.turned()], notes=found.notes)
    yield from _tuning_of(runs)
    yield make_section("curves", "Curves", pictures=found.pictures)
    yield make_section("differences", found.differences.title, tables=[found.differences])
    for number, run in enumerate(runs, 1):
        section = make_section(f"run-{number}", f"Run {run.name}", findings=summarise(run, is_compared=True))
        section.add("tables", validation_table, run)
        yield section


def _tuning_of(runs: Sequence[RunRecords]) -> Iterator[Section]:
    """Yield what stages after pre-training changed, where there are any."""
    from moe_gpt.report import tuning

    tuned = [run for run in runs if run.stage]
    finders = {"tuning": tuning.tables_of_scores, "reinforcement": tuning.draw_reinforcement}
    for name, find in {**finders, "preferences": tuning.draw_preferences}.items():
        section = Section(name, words()["sections"][name]["title"])
        section.add("tables" if name == "tuning" else "pictures", find, tuned)
        if any(section.parts.values()):
            yield section


def make_section(name: str, title: str, **parts: list) -> Section:
    """Return a section with some parts."""
    section = Section(name, title)
    section.parts.update(parts)
    return section
