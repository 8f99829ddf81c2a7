"""A run in words: what was trained, whether it learned, whether its experts are used, whether they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moe_gpt.config import FaultConfig, ModelConfig
from moe_gpt.config.section import Section
from moe_gpt.measure import routing
from moe_gpt.measure.health import Gradients, find_problems, recorded_window
from moe_gpt.report.missing import attempt, need, sentence
from moe_gpt.report.pictures import Table
from moe_gpt.report.recorded_routing import counts_by_source, last_with_counts, newest_gradients, total_counts
from moe_gpt.report.run_records import RunRecords
from moe_gpt.terminal.numbers import format_count, format_number, plural

SectionType = TypeVar("SectionType", bound=Section)
Answer = tuple[str, list[str]]
"""The answer in a word or two, and why."""
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
    between = " and ".join(run.sources) if len(run.sources) == 2 else "sources"
    about_experts = {
        "Are the experts used?": _whether_experts_are_used,
        f"Do the experts differ between {between}?": _whether_experts_differ,
        "Is the router healthy?": _whether_the_router_is_healthy,
    }
    about_dense = {"Was it worth it against dense?": _whether_it_was_worth_it}
    questions = {
        "What was trained?": _what_was_trained,
        "Did it learn?": _whether_it_learned,
        **({} if run.is_dense else about_experts),
        **({} if run.is_dense or is_compared else about_dense),
        "Did anything go wrong?": _what_went_wrong,
    }
    return [_find(question, answer, run) for question, answer in questions.items()]


def _find(question: str, answer: Callable[[RunRecords], Answer], run: RunRecords) -> Finding:
    found, reason = attempt(answer, run)
    return Finding(question, *(found or ("Not known", [reason])))


def _what_was_trained(run: RunRecords) -> Answer:
    tokens, total = run.last("tokens_seen"), run.stages[-1].get("until_tokens") if run.stages else None
    short = f"{format_count(tokens)} tokens in {plural(run.last('step'), 'step')}"
    if total and tokens < total:
        short = f"{short}: {100 * tokens / total:.0f} % of the plan, the run is not finished"
    shape, reason = attempt(_shape_of_the_model, run)
    because = [shape or reason]
    return short, because + ([f"Sources of text: {', '.join(run.sources)}."] if run.sources else [])


def _shape_of_the_model(run: RunRecords) -> str:
    need(run.section("model"), "the shape of the model is not known")
    from moe_gpt.measure.parameters import count_parameters

    model = known_settings(ModelConfig, run.section("model"))
    counts = count_parameters(model)
    kind = "dense" if model.is_dense else f"{model.n_experts} experts of which each token uses {model.top_k}"
    used = "" if model.is_dense else f", {format_count(counts.active)} of them used for a token"
    return (
        f"A model of {format_count(counts.total)} parameters{used}: {model.n_layers} layers of width {model.d_model}, "
        f"{kind}, vocabulary {model.vocab_size or 1:,}, sequences up to {model.max_seq_len:,} tokens."
    )


def known_settings(section: type[SectionType], values: dict[str, Any]) -> SectionType:
    """Build a section from a config of any version: keys that we do not know are left out, missing ones are defaults.

    Raises:
        ValueError: where a value is impossible.
    """
    return section.from_mapping({key: values[key] for key in section.__dataclass_fields__ if key in values})


def _whether_it_learned(run: RunRecords) -> Answer:
    losses = {source: series.values for source, series in run.all_scores().items()}
    need(losses, "there is no evaluation")
    guess, n_evaluations = _loss_of_guessing(run), max(map(len, losses.values()))
    because = [_losses_in_words(run, source, values) for source, values in losses.items()]
    if math.isfinite(guess):
        because.append(f"Guessing every token with equal probability would cost {guess:.3f} nats, ln(vocabulary).")
    if n_evaluations == 1:
        because.append("There is only one evaluation, so nothing is said about change.")
    if n_evaluations == 1 and math.isinf(guess):
        return "Not known", because
    verdicts = [_is_better(values, guess) for values in losses.values()]
    return ("Not yet", "On some sources only", "Yes")[any(verdicts) + all(verdicts)], because


def _losses_in_words(run: RunRecords, source: str, losses: np.ndarray) -> str:
    bits = run.scores(source, "bits_per_byte").values
    in_bytes = f", {format_number(float(bits[-1]))} bits per byte" if len(bits) else ""
    first = f", {losses[0]:.3f} at the first evaluation" if len(losses) > 1 else ""
    last = float(losses[-1])
    score = f"{last:.3f} nats per token at the last evaluation (perplexity {perplexity(last)}{in_bytes})"
    return f"{source}: {score}{first}."


def _is_better(losses: np.ndarray, guess: float) -> bool:
    """Tell whether the last loss is clearly below guessing, and below the first where there is another."""
    return bool(losses[-1] < 0.9 * guess and (len(losses) == 1 or losses[-1] < 0.97 * losses[0]))


def _loss_of_guessing(run: RunRecords) -> float:
    """Return the cross entropy of equal probabilities; infinite where the vocabulary is not known."""
    size = run.section("model").get("vocab_size")
    return math.log(size) if isinstance(size, int) and size > 1 else math.inf


def perplexity(nats: float) -> str:
    """Return e to the power of a loss, in words where it is beyond sense."""
    return format_number(float(f"{math.exp(nats):.4g}")) if nats < 30 else "over 10 trillion"


def _whether_experts_are_used(run: RunRecords) -> Answer:
    arrays = last_with_counts(run)
    counts = total_counts(arrays)
    violation, dead = routing.max_violation(counts), routing.dead_experts(counts)
    busiest = (
        f"On held-out text at step {arrays.step:,} the busiest expert of a layer has {1 + violation.min():.3g} to "
        f"{1 + violation.max():.3g} times the mean load (most in layer {int(np.argmax(violation))})."
    )
    if not dead.any():
        return "Yes, all of them", [busiest, f"None of the {dead.size} experts is dead (below 1 % of an even share)."]
    where = [f"layer {i}: {', '.join(map(str, np.flatnonzero(dead[i])))}" for i in np.flatnonzero(dead.any(axis=1))]
    short = "No" if dead.mean() > 0.5 else f"Not all: {dead.sum()} of {dead.size} are dead"
    return short, [busiest, f"Below 1 % of an even share, so called dead: {'; '.join(where)}."]


def _whether_experts_differ(run: RunRecords) -> Answer:
    sources, _ = counts_by_source(run)
    need(len(sources) >= 2, "there is only one source of text, so there is nothing to tell apart")
    percents = [row[2] for row in domain_table(run).rows]
    low, high = min(percents), max(percents)
    short = ("Hardly", "Somewhat", "Clearly")[(high >= _HARDLY) + (high > _CLEARLY)]
    names = " or ".join(sources) if len(sources) < 5 else f"which of {len(sources)} sources"
    span = f"{low:.2g} to {high:.2g} %" if low < high else f"{high:.2g} %"
    return short, [
        f"Knowing which expert got a token tells {span} of what there is to know about whether it is {names}, by layer "
        f"(0 %: all experts see the same mixture; 100 %: sources share no expert). An untrained router has 1 to "
        f"{_HARDLY:.0f} %, because sources have tokens of their own; from {_CLEARLY:.0f} % on this page says clearly.",
    ]


def domain_table(run: RunRecords) -> Table:
    """Return the domain information of each layer: nats, and percent of the maximum."""
    _, counts = counts_by_source(run)
    found = [routing.domain_information(counts[:, layer]) for layer in range(counts.shape[1])]
    rows = [(layer, float(f"{f.nats:.3g}"), float(f"{100 * f.fraction:.3g}")) for layer, f in enumerate(found)]
    return Table(("layer", "domain information (nats)", "of the maximum (%)"), rows)


def _whether_the_router_is_healthy(run: RunRecords) -> Answer:
    records = [line["routing"] for line in run.records if "routing" in line]
    gradients = newest_gradients(run)
    need(records or gradients, "no step has recorded its routing, and no evaluation its gradients")
    need(run.section("model"), "the model's config is not known, so there is nothing to judge by")
    model, faults = (
        known_settings(ModelConfig, run.section("model")),
        known_settings(FaultConfig, run.section("faults")),
    )
    every = run.section("train").get("record_every_steps") or 1
    window = recorded_window(faults, every)
    problems = find_problems(records, gradients, model, faults, every)
    limits = list(_limits_of_the_check(len(records), window, gradients))
    if problems:
        told = [f"Layer {p.layer}: {p.text}. What to try: {p.advice}." for p in problems]
        return f"{plural(len(problems), 'problem')} found", told + limits
    short = "Too early to say" if len(records) < window else "No problem found"
    return short, limits or ["Load, growth of imbalance and logits, entropies and gradients were checked."]


def _limits_of_the_check(n_records: int, window: int, gradients: Gradients | None) -> Iterator[str]:
    if n_records < 3 * window:
        judged = "neither loads nor" if n_records < window else "loads but not"
        yield f"With {n_records} recorded steps the check looked at {judged} growth; that takes {3 * window} of them."
    if gradients is None:
        yield "No gradients are recorded, so nobody looked whether the routers learn from cross entropy."


def _whether_it_was_worth_it(run: RunRecords) -> Answer:
    model, width = run.section("model"), "a wider model.d_ff"
    if {"top_k", "d_ff"} <= model.keys():
        width = f"model.d_ff={model['top_k'] * model['d_ff']}"
    return "One run cannot tell", [
        f"Train the dense model of the same active size (the same command with another --run-dir, model.n_experts=1 "
        f"model.top_k=1 {width}) and compare: python scripts/report.py {run.run_dir} DENSE_RUN. The comparison is over "
        "tokens, over compute and over time, which need not agree."
    ]


def _what_went_wrong(run: RunRecords) -> Answer:
    found = list(filter(None, (_skipped_steps(run), _dropped_assignments(run), _unusual_events(run))))
    found += [sentence(f"missing: {note}") for note in run.notes]
    quiet = "Nothing was skipped, dropped or warned about; nothing is missing."
    n_resumes = sum(event.get("kind") == "resume" for event in run.events)
    resumed = [f"The run was resumed {plural(n_resumes, 'time')}."] if n_resumes else []
    return "See below" if found else "No", (found or [quiet]) + resumed


def _skipped_steps(run: RunRecords) -> str:
    steps = [line["step"] for line in run.steps if line.get("skipped")]
    why = "the loss or the gradient was not finite"
    return f"{plural(len(steps), 'step')} skipped, because {why}; first at step {steps[0]:,}." if steps else ""


def _dropped_assignments(run: RunRecords) -> str:
    dropped = [line.get("dropped_fraction") or 0.0 for line in run.steps]
    text = "Full experts dropped {:.2g} % of the assignments in the mean."
    return text.format(100 * float(np.mean(dropped))) if any(dropped) else ""


def _unusual_events(run: RunRecords) -> str:
    kinds = [str(event.get("kind")) for event in run.events if event.get("kind") not in _ORDINARY_EVENTS]
    text = f"Warnings and other events: {len(kinds)} ({', '.join(sorted(set(kinds)))}); see Events."
    return text if kinds else ""
