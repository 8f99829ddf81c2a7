"""A run in words: what was trained, whether it learned, whether its experts are used, whether they differ.

Functions here find the values of an answer; words.yaml says it.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moe_gpt.config import FaultConfig, ModelConfig
from moe_gpt.config.section import Section
from moe_gpt.measure import routing
from moe_gpt.measure.health import find_problems, recorded_window
from moe_gpt.report.missing import attempt, need
from moe_gpt.report.pictures import Table
from moe_gpt.report.recorded import EvaluationArrays, RunRecords, section_of
from moe_gpt.report.words import paragraphs, say, words
from moe_gpt.terminal.numbers import format_number

SectionType = TypeVar("SectionType", bound=Section)
Facts = dict[str, Any]
_HARDLY, _CLEARLY = 4.0, 10.0
"""Domain information in percent: an untrained router, whose choices follow token ids, has 1 to 4."""
_ORDINARY_EVENTS = ("start", "resume", "first_checkpoint")


@dataclass(frozen=True)
class Finding:
    """A question that a reader has, the answer in a word or two, and why."""

    question: str
    short: str
    because: list[str]


def summarise(run: RunRecords, is_compared: bool = False) -> list[Finding]:
    """Return the answers that a reader wants within a minute.

    Args:
        run: as recorded.
        is_compared: whether other runs are beside it, which say whether experts were worth it.
    """
    questions: dict[str, Callable[[RunRecords], Facts]] = {"trained": _what_was_trained}
    questions |= {"tuned": _what_the_stage_changed} if run.stage else {"learned": _whether_it_learned}
    if run.shows_experts:
        questions |= {"used": _whether_experts_are_used, "differ": _whether_experts_differ}
        questions |= {"healthy": _whether_the_router_is_healthy} if run.records_steps else {}
        questions |= {} if is_compared or run.stage else {"worth": _whether_it_was_worth_it}
    questions |= {"wrong": _what_went_wrong}
    return [_find(name, find, run) for name, find in questions.items()]


def _find(name: str, find: Callable[[RunRecords], Facts], run: RunRecords) -> Finding:
    told = words()["summary"][name]

    def answer() -> tuple[str, list[str]]:
        facts = find(run)
        return say(told["short"], run=run, **facts), paragraphs(told["because"], run=run, **facts)

    question = say(told["question"], run=run)
    found, reason = attempt(find.__name__.strip("_").replace("_", " "), answer)
    return Finding(question, *(found or ("Not known", [reason])))


def _what_was_trained(run: RunRecords) -> Facts:
    found, reason = attempt("shape of the model", _shape_of_the_model, run)
    model, counts = found or (None, None)
    return {"tokens": run.last("tokens_seen"), "model": model, "counts": counts, "reason": reason}


def _shape_of_the_model(run: RunRecords) -> tuple[ModelConfig, Any]:
    need(run.section("model"), "the shape of the model is not known")
    from moe_gpt.measure.parameters import count_parameters

    model = known_settings(ModelConfig, run.section("model"))
    return model, count_parameters(model)


def known_settings(section: type[SectionType], values: dict[str, Any]) -> SectionType:
    """Build a section from a config of any version: keys that we do not know are left out, missing ones are defaults.

    Raises:
        ValueError: where a value is impossible.
    """
    return section.from_mapping({key: values[key] for key in section.__dataclass_fields__ if key in values})


def _what_the_stage_changed(run: RunRecords) -> Facts:
    before, after = (section_of(run.stage_scores, time) for time in ("before", "after"))
    need(after, "there are no scores: an unfinished run has none, nor has a run that learns from files alone")
    task = next(iter(after))
    return {"task": task, "before": section_of(before, task), "after": after[task], "meaning": words()["tasks"]}


def _whether_it_learned(run: RunRecords) -> Facts:
    scores = run.all_scores()
    need(scores, "there is no evaluation")
    size = run.section("model").get("vocab_size")
    guess = math.log(size) if isinstance(size, int) and size > 1 else math.inf
    verdicts = [_is_better(series.values, guess) for series in scores.values()]
    tokens = [series.tokens for series in scores.values()]
    facts = {"scores": scores, "perplexity": perplexity, "guess": guess, "infinity": math.inf}
    facts |= {"n_evaluations": max(map(len, tokens)), "is_untrained": not np.concatenate(tokens).any()}
    needed = known_settings(FaultConfig, run.section("faults")).routing_window
    is_early = run.is_short and run.evaluations[-1]["step"] < needed and not all(verdicts)
    return facts | {"verdict": any(verdicts) + all(verdicts), "is_early": is_early}


def _is_better(losses: np.ndarray, guess: float) -> bool:
    """Tell whether the last loss is clearly below guessing, and below the first where there is another."""
    return bool(losses[-1] < 0.9 * guess and (len(losses) == 1 or losses[-1] < 0.97 * losses[0]))


def perplexity(nats: float) -> str:
    """Return e to the power of a loss, in words where it is beyond sense."""
    return format_number(float(f"{math.exp(nats):.4g}")) if nats < 30 else "over 10 trillion"


def _whether_experts_are_used(run: RunRecords) -> Facts:
    arrays = run.last_with_counts()
    counts = arrays.total_counts()
    dead = routing.dead_experts(counts)
    return _time_of(arrays, run) | {"loads": 1 + routing.max_violation(counts), "dead": dead}


def _time_of(arrays: EvaluationArrays, run: RunRecords) -> Facts:
    """Return the step of an evaluation, and from which step on its routing is judged."""
    window = known_settings(FaultConfig, run.section("faults")).routing_window
    needed = 0 if run.stage else window  # a later stage begins with trained routers
    return {"step": arrays.step, "needed": needed, "is_early": arrays.step < needed}


def _whether_experts_differ(run: RunRecords) -> Facts:
    sources, _ = run.counts_by_source()
    need(len(sources) >= 2, "there is only one source of text, so there is nothing to tell apart")
    percents = [row[2] for row in domain_table(run).rows]
    low, high = min(percents), max(percents)
    facts = {"sources": sources, "low": low, "high": high, "hardly": _HARDLY, "clearly": _CLEARLY}
    return facts | _time_of(run.last_with_counts(), run) | {"verdict": (high >= _HARDLY) + (high > _CLEARLY)}


def domain_table(run: RunRecords) -> Table:
    """Return the domain information of each layer: nats, and percent of the maximum."""
    _, counts = run.counts_by_source()
    found = [routing.domain_information(counts[:, layer]) for layer in range(counts.shape[1])]
    rows = [(layer, float(f"{f.nats:.3g}"), float(f"{100 * f.fraction:.3g}")) for layer, f in enumerate(found)]
    return Table(("layer", "domain information (nats)", "of the maximum (%)"), rows, "Domain information")


def _whether_the_router_is_healthy(run: RunRecords) -> Facts:
    records, gradients = run.routings, run.gradients
    need(records or gradients, "no step has recorded its routing, and no evaluation its gradients")
    need(run.section("model"), "the model's config is not known, so there is nothing to judge by")
    model = known_settings(ModelConfig, run.section("model"))
    faults = known_settings(FaultConfig, run.section("faults"))
    every = run.section("train").get("record_every_steps") or 1
    problems = find_problems(records, gradients, model, faults, every)
    window = recorded_window(faults, every)
    return {"problems": problems, "n_records": len(records), "window": window, "gradients": gradients is not None}


def _whether_it_was_worth_it(run: RunRecords) -> Facts:
    model, dense = run.section("model"), run.run_dir.parent / f"{run.run_dir.resolve().name}-dense"
    return {"dense": dense, "width": model["top_k"] * model["d_ff"] if {"top_k", "d_ff"} <= model.keys() else "WIDTH"}


def _what_went_wrong(run: RunRecords) -> Facts:
    kinds = collections.Counter(str(event.get("kind")) for event in run.events)
    dropped = np.array([line.get("dropped_fraction") for line in run.steps], dtype=float)
    return {
        "skipped": [line["step"] for line in run.steps if line.get("skipped")],
        "dropped": 100 * np.nan_to_num(dropped).sum() / max(1, len(dropped)),
        "kinds": sorted(kind for kind in kinds.elements() if kind not in _ORDINARY_EVENTS),
        "n_resumes": kinds["resume"],
    }
