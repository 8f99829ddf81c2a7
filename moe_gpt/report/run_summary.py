"""A run in words: what was trained, whether it learned, whether its experts are used, whether they differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moe_gpt.config import FaultConfig, ModelConfig
from moe_gpt.config.section import Section
from moe_gpt.measure import routing
from moe_gpt.measure.health import find_problems
from moe_gpt.report.pictures import Table
from moe_gpt.report.recorded_routing import NotRecorded, counts_by_source, last_with_counts, total_counts
from moe_gpt.report.run_pictures import stages_of
from moe_gpt.report.run_records import RunRecords
from moe_gpt.terminal.numbers import format_count, format_number

SectionType = TypeVar("SectionType", bound=Section)
_HARDLY, _CLEARLY = 4.0, 10.0
"""Domain information in percent: an untrained router, whose choices follow token ids, has 1 to 4."""


@dataclass(frozen=True)
class Answer:
    """A question that a reader has, the answer in a word or two, and why."""

    question: str
    short: str
    because: list[str]


def summarise(run: RunRecords, is_compared: bool = False) -> list[Answer]:
    """Return the answers that a reader wants within a minute.

    Args:
        run: as recorded.
        is_compared: whether other runs are beside it, which say whether experts were worth it.
    """
    answers = [_answer("What was trained?", _what, run), _answer("Did it learn?", _learned, run)]
    if not is_dense(run):
        between = f"{run.sources[0]} and {run.sources[1]}" if len(run.sources) == 2 else "sources"
        answers.append(_answer("Are the experts used?", _used, run))
        answers.append(_answer(f"Do the experts differ between {between}?", _differ, run))
        answers.append(_answer("Is the router healthy?", _healthy, run))
        if not is_compared:
            answers.append(_answer("Was it worth it against dense?", _against_dense, run))
    answers.append(_answer("Did anything go wrong?", _went_well, run))
    return answers


def _answer(question: str, find: Any, run: RunRecords) -> Answer:
    try:
        short, because = find(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, NotRecorded) else f"what was recorded cannot be read: {error}"
        return Answer(question, "Not known", [sentence(reason)])
    return Answer(question, short, because)


def _against_dense(run: RunRecords) -> tuple[str, list[str]]:
    model = run.config.get("model") or {}
    width = (
        f"model.d_ff={model['top_k'] * model['d_ff']}" if {"top_k", "d_ff"} <= model.keys() else "a wider model.d_ff"
    )
    return "One run cannot tell", [
        f"Train the dense model of the same active size (the same command with another --run-dir, model.n_experts=1 "
        f"model.top_k=1 {width}) and compare: python scripts/report.py {run.run_dir} DENSE_RUN. The comparison is over "
        "tokens, over compute and over time, which need not agree."
    ]


def sentence(text: str) -> str:
    """Return words as a sentence."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def is_dense(run: RunRecords) -> bool:
    """Tell whether the config has a single feed-forward network in each layer."""
    return (run.config.get("model") or {}).get("n_experts") == 1


def known_settings(section: type[SectionType], values: Any) -> SectionType:
    """Build a section from a config of any version: keys that we do not know are left out, missing ones are defaults.

    Raises:
        ValueError: where a value is impossible.
    """
    known = section.__dataclass_fields__
    return section.from_mapping({key: value for key, value in (values or {}).items() if key in known})


def _what(run: RunRecords) -> tuple[str, list[str]]:
    steps = max((line["step"] for line in [*run.steps[-1:], *run.evaluations[-1:]]), default=0)
    tokens = max((line.get("tokens_seen") or 0 for line in [*run.steps[-1:], *run.evaluations[-1:]]), default=0)
    total = next((stage.get("until_tokens") for stage in reversed(stages_of(run))), None)
    short = f"{format_count(tokens)} tokens in {steps:,} step{'s' * (steps != 1)}"
    if total and tokens < total:
        short = f"{short}: {100 * tokens / total:.0f} % of the plan, the run is not finished"
    because = [_shape(run)]
    if run.sources:
        because.append(f"Sources of text: {', '.join(run.sources)}.")
    return short, because


def _shape(run: RunRecords) -> str:
    if not run.config.get("model"):
        return "The shape of the model is not known."
    try:
        model = known_settings(ModelConfig, run.config["model"])
        from moe_gpt.measure.parameters import count_parameters

        counts = count_parameters(model)
    except (ArithmeticError, ImportError, RuntimeError, TypeError, ValueError) as error:
        return f"The model's config cannot be read: {str(error).splitlines()[0]}."
    kind = "dense" if model.is_dense else f"{model.n_experts} experts of which each token uses {model.top_k}"
    used = "" if model.is_dense else f", {format_count(counts.active)} of them used for a token"
    return (
        f"A model of {format_count(counts.total)} parameters{used}: {model.n_layers} layers of width {model.d_model}, "
        f"{kind}, vocabulary {model.vocab_size or 1:,}, sequences up to {model.max_seq_len:,} tokens."
    )


def _learned(run: RunRecords) -> tuple[str, list[str]]:
    because, verdicts = list[str](), list[bool]()
    guess = _loss_of_guessing(run)
    for source in run.sources:
        _, losses = run.scores(source)
        if not len(losses):
            continue
        _, bits = run.scores(source, "bits_per_byte")
        last, first = float(losses[-1]), float(losses[0])
        in_bytes = f", {format_number(float(bits[-1]))} bits per byte" if len(bits) else ""
        text = f"{source}: {last:.3f} nats per token at the last evaluation (perplexity {perplexity(last)}{in_bytes})"
        because.append(f"{text}, {first:.3f} at the first evaluation." if len(losses) > 1 else f"{text}.")
        verdicts.append(last < 0.9 * (guess or math.inf) and (len(losses) == 1 or last < 0.97 * first))
    if not verdicts:
        raise NotRecorded("there is no evaluation")
    if guess:
        because.append(f"Guessing every token with equal probability would cost {guess:.3f} nats, ln(vocabulary).")
    n_evaluations = max(len(run.scores(source)[0]) for source in run.sources)
    if n_evaluations == 1:
        because.append("There is only one evaluation, so nothing is said about change.")
    if n_evaluations == 1 and not guess:
        return "Not known", because
    return "Yes" if all(verdicts) else "On some sources only" if any(verdicts) else "Not yet", because


def _loss_of_guessing(run: RunRecords) -> float | None:
    size = (run.config.get("model") or {}).get("vocab_size")
    return math.log(size) if isinstance(size, int) and size > 1 else None


def perplexity(nats: float) -> str:
    """Return e to the power of a loss, in words where it is beyond sense."""
    return format_number(float(f"{math.exp(nats):.4g}")) if nats < 30 else "over 10 trillion"


def _used(run: RunRecords) -> tuple[str, list[str]]:
    arrays = last_with_counts(run)
    counts = total_counts(arrays)
    violation, dead = routing.max_violation(counts), routing.dead_experts(counts)
    worst = int(np.argmax(violation))
    because = [
        f"On held-out text at step {arrays.step:,} the busiest expert of a layer has {1 + violation.min():.3g} to "
        f"{1 + violation.max():.3g} times the mean load (most in layer {worst})."
    ]
    where = [f"layer {i}: {', '.join(map(str, np.flatnonzero(row)))}" for i, row in enumerate(dead) if row.any()]
    n_dead, n_all = int(dead.sum()), dead.size
    if where:
        because.append(f"Below 1 % of an even share, so called dead: {'; '.join(where)}.")
        return ("No" if n_dead > n_all / 2 else f"Not all: {n_dead} of {n_all} are dead"), because
    because.append(f"None of the {n_all} experts is dead (below 1 % of an even share).")
    return "Yes, all of them", because


def _differ(run: RunRecords) -> tuple[str, list[str]]:
    sources, _ = counts_by_source(run)
    if len(sources) < 2:
        return "Not known", ["There is only one source of text, so there is nothing to tell apart."]
    percents = [row[2] for row in domain_table(run).rows]
    low, high = min(percents), max(percents)
    short = "Hardly" if high < _HARDLY else "Clearly" if high > _CLEARLY else "Somewhat"
    names = " or ".join(sources) if len(sources) < 5 else f"which of {len(sources)} sources"
    span = f"{low:.2g} to {high:.2g} %" if low < high else f"{high:.2g} %"
    because = [
        f"Knowing which expert got a token tells {span} of what there is to know about whether it is {names}, by layer "
        f"(0 %: all experts see the same mixture; 100 %: sources share no expert). An untrained router has 1 to "
        f"{_HARDLY:.0f} %, because sources have tokens of their own; from {_CLEARLY:.0f} % on this page says clearly.",
    ]
    return short, because


def domain_table(run: RunRecords) -> Table:
    """Return the domain information of each layer: nats, and percent of the maximum.

    Raises:
        NotRecorded: where no evaluation has counted assignments.
    """
    _, counts = counts_by_source(run)
    found = [routing.domain_information(counts[:, layer]) for layer in range(counts.shape[1])]
    rows = [(layer, float(f"{f.nats:.3g}"), float(f"{100 * f.fraction:.3g}")) for layer, f in enumerate(found)]
    return Table(("layer", "domain information (nats)", "of the maximum (%)"), rows)


def _healthy(run: RunRecords) -> tuple[str, list[str]]:
    records = [line["routing"] for line in run.records if "routing" in line]
    gradients = next((a.gradients for a in reversed(run.arrays) if a.step > 0 and a.gradients is not None), None)
    if not records and gradients is None:
        raise NotRecorded("no step has recorded its routing, and no evaluation its gradients")
    if not run.config.get("model"):
        raise NotRecorded("the model's config is not known, so there is nothing to judge by")
    model = known_settings(ModelConfig, run.config["model"])
    faults = known_settings(FaultConfig, run.config.get("faults"))
    every = (run.config.get("train") or {}).get("record_every_steps") or 1
    problems = find_problems(records, gradients, model, faults, every)
    window = max(1, faults.routing_window // max(1, every))
    limits = []
    if len(records) < 3 * window:
        judged = "neither loads nor" if len(records) < window else "loads but not"
        limits.append(
            f"With {len(records)} recorded steps the check looked at {judged} growth; that takes {3 * window} of them."
        )
    if gradients is None:
        limits.append("No gradients are recorded, so nobody looked whether the routers learn from cross entropy.")
    if problems:
        return f"{len(problems)} problem{'s' * (len(problems) > 1)} found", [
            *(f"Layer {p.layer}: {p.text}. What to try: {p.advice}." for p in problems),
            *limits,
        ]
    if len(records) < window:
        return "Too early to say", limits
    return "No problem found", limits or ["Load, growth of imbalance and logits, entropies and gradients were checked."]


def _went_well(run: RunRecords) -> tuple[str, list[str]]:
    skipped = [line["step"] for line in run.steps if line.get("skipped")]
    dropped = [line.get("dropped_fraction") or 0.0 for line in run.steps]
    other = [event for event in run.events if event.get("kind") not in ("start", "resume", "first_checkpoint")]
    resumes = sum(event.get("kind") == "resume" for event in run.events)
    texts = []
    if skipped:
        were, their = ("steps were", "their") if len(skipped) > 1 else ("step was", "its")
        why = f"because {their} loss or gradient was not finite, the first at step {skipped[0]:,}"
        texts.append(f"{len(skipped):,} {were} skipped {why}.")
    if any(dropped):
        texts.append(f"Full experts dropped {100 * float(np.mean(dropped)):.2g} % of the assignments in the mean.")
    if other:
        kinds = sorted({str(event.get("kind")) for event in other})
        s = "s" * (len(other) > 1)
        texts.append(f"{len(other)} warning{s} or other event{s}: {', '.join(kinds)} (see Events).")
    texts += [sentence(f"Missing: {note}") for note in run.notes]
    quiet = "Nothing was skipped, dropped or warned about; nothing is missing."
    resumed = [f"The run was resumed {resumes} time{'s' * (resumes > 1)}."] if resumes else []
    return "See below" if texts else "No", [*(texts or [quiet]), *resumed]
