"""What a report shows of a model before and after a stage: its answers to fixed prompts, and where tokens go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_gpt.measure import routing
from moe_gpt.report.expert_pictures import draw_shares
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Picture, Table
from moe_gpt.report.recorded import EvaluationArrays, RunRecords, Slice
from moe_gpt.report.routed_text import show_controls
from moe_gpt.report.words import paragraphs, words

_TIMES = ("before", "after")
_LONGEST_TEXT = 160
"""Characters of a prompt or an answer."""
_OWN = "prompts and answers"
"""What the held-out text of the stage itself is called."""


def about_answers(run: RunRecords) -> list[str]:
    """Return what the prompts and answers are."""
    return paragraphs(words()["answers"]["text"], stage=run.stage) if run.stage_scores.get("answers_after") else []


def fixed_answers(run: RunRecords) -> Table:
    """Return fixed held-out prompts with the model's answers before and after the stage."""
    told = words()["answers"]
    before, after = (run.stage_scores.get(f"answers_{time}") or [] for time in _TIMES)
    need(after, told["missing"])
    columns = {heading: _texts(after, key) for key, heading in told["columns"].items() if key in after[0]}
    columns |= {"before": _texts([*before, *({} for _ in after)][: len(after)], "answer")}
    return Table.of(columns | {"after": _texts(after, "answer")}, "Answers to fixed prompts", has_texts=True)


def _texts(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [_shown(row.get(key)) for row in rows]


def _shown(value: Any) -> Any:
    """Return a text without control characters and empty lines, shortened; other values as they are."""
    if not isinstance(value, str):
        return value
    value = re.sub(r"\n\s*\n", "\n", value)
    text = value if len(value) <= _LONGEST_TEXT else value[: _LONGEST_TEXT - 1] + "…"
    return show_controls(text).strip() or "(nothing)"


def draw_routing_change(run: RunRecords) -> Picture:
    """Draw the share of assignments that each expert gets before and after the stage, of the same tokens."""
    name, pair = next(iter(_read_twice(run).items()))
    counts = np.stack([_counts(part, run.n_experts) for part in pair])
    facts = {"text": name, "n_tokens": pair[0].tokens.size, "top_k": pair[0].choices.shape[-1]}
    return draw_shares("routing-change", _TIMES, counts, "% of assignments", **facts)


def routing_change(run: RunRecords) -> Table:
    """Return, for each layer, how many choices changed in each text, and the load of the busiest expert."""
    found = _read_twice(run)
    name, first = next(iter(found.items()))
    loads = [1 + routing.max_violation(_counts(part, run.n_experts)) for part in first]
    columns: dict[str, Any] = {"layer": range(len(loads[0]))}
    columns |= {f"changed: {text} (%)": 100 * _changed(*pair) for text, pair in found.items()}
    columns |= {f"busiest expert {time}": load for time, load in zip(_TIMES, loads, strict=True)}
    return Table.of(columns, f"Choices that changed, and the load of the busiest expert (of {name}; 1 = even)")


def _read_twice(run: RunRecords) -> dict[str, tuple[Slice, Slice]]:
    """Return the texts whose experts are recorded before and after the stage, first those of the stage itself."""
    before = _slices(run.stage_routing.get("before"), [first for first in run.arrays[:1] if first.step == 0])
    after = _slices(run.stage_routing.get("after"), run.arrays[1:][-1:])
    names = [name for name in (_OWN, *run.in_order(run.sources)) if _is_same_text(before.get(name), after.get(name))]
    need(names, "the experts of the same tokens before and after the stage are not recorded")
    return {name: (before[name], after[name]) for name in names}


def _slices(own: Slice | None, arrays: Sequence[EvaluationArrays]) -> dict[str, Slice]:
    """Return what was recorded at a time, by the names of the texts."""
    return ({_OWN: own} if own else {}) | (arrays[0].slices if arrays else {})


def _is_same_text(before: Slice | None, after: Slice | None) -> bool:
    return bool(before and after and np.array_equal(before.tokens, after.tokens))


def _counts(part: Slice, n_experts: int) -> np.ndarray:
    """Return the assignments (L, E)."""
    return np.stack([np.bincount(layer.ravel(), minlength=n_experts) for layer in part.choices])


def _changed(before: Slice, after: Slice) -> np.ndarray:
    """Return the share of the choices (L,) that another expert has taken."""
    flat = [part.choices.reshape(len(part.choices), -1, part.choices.shape[-1]) for part in (before, after)]
    return 1 - routing.saturation(*flat)
