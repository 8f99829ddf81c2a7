"""What a report shows of a stage after pre-training: scores before and after it, and what its steps recorded.

Their words and keys are in words.yaml and picture_words.yaml. A list is empty where no run has such a thing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_gpt.config.vision import BASELINES
from moe_gpt.report import pictures
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Panel, Picture, Table
from moe_gpt.report.recorded import RunRecords, section_of
from moe_gpt.report.series import Series
from moe_gpt.report.words import paragraphs, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOSTLY_FLAT = 0.9
"""Share of flat groups from which on a run learns almost nothing."""
_N_PARTS = 12
"""A value of a step is noisy, as few answers are: pictures have means of a twelfth of the steps."""
_KL, _SPREADS = "KL (nats per answer)", "standard deviations"
Lines = Callable[[RunRecords, str], Series]
Rows = Iterator[tuple[str, tuple[Any, ...]]]


def scores(run: RunRecords) -> list[Table]:
    """Return the scores before and after the stage, and the loss on held-out text."""
    need(run.stage_scores, "there is no scores.json, which moe-gpt finetune writes")
    return tables_of_scores([run])


def tables_of_scores(runs: Sequence[RunRecords]) -> list[Table]:
    """Return the scores of runs in one table, and the losses on held-out text in another."""
    tables = [
        _table("Exact match by task and turn", ("task", "turn", "n", "before", "after"), "score", runs, _exact),
        _table("Scores before and after", ("n", "before", "after"), "score", runs, _scores),
        _table("Scores, and what is right without seeing", ("n", "score", *BASELINES), "task", runs, _seeing),
        _table("Forgetting", ("before (nats per token)", "after", "rise"), "held-out text", runs, _forgetting),
    ]
    return [table for table in tables if table.rows]


def _table(
    title: str, columns: tuple[str, ...], first: str, runs: Sequence[RunRecords], find: Callable[[RunRecords], Rows]
) -> Table:
    """Return a row for each name that ``find`` yields of a run; rows of a name are together, with the runs' names."""
    found = [(name, run.name, *cells) for run in runs for name, cells in find(run)]
    names = list(dict.fromkeys(row[0] for row in found))
    rows = sorted(found, key=lambda row: names.index(row[0]))
    if len(runs) > 1:
        return Table((first, "run", *columns), rows, title)
    return Table((first, *columns), [(name, *cells) for name, _, *cells in rows], title)


def _exact(run: RunRecords) -> Rows:
    """Yield the scores of turns of conversations, with the task and the turn."""
    scores = dict(_all_scores(run))
    yield from ((name, (*turn, *scores[name])) for name, turn in words()["turns"].items() if name in scores)


def _scores(run: RunRecords) -> Rows:
    """Yield the other scores."""
    known = {*words()["turns"]} | ({*section_of(run.stage_scores, "after")} if run.stage == "see" else set())
    yield from ((name, cells) for name, cells in _all_scores(run) if name not in known)


def _seeing(run: RunRecords) -> Rows:
    """Yield the scores of a model that sees, with its baselines."""
    found = section_of(run.stage_scores, "after").items() if run.stage == "see" else ()
    for task, score in ((task, score) for task, score in found if score.get("n")):
        shares = [score.get(name) for name in BASELINES]
        cells = ["–" if share is None else f"{share:.3f}" for share in shares]
        yield task, (score.get("n"), _with_error(score), *cells)


def _all_scores(run: RunRecords) -> Rows:
    before, after = (section_of(run.stage_scores, time) for time in ("before", "after"))
    for task in dict.fromkeys([*before, *after]):
        parts = [section_of(part, task) for part in (before, after)]
        if numbers := [part["n"] for part in parts if part.get("n")]:  # a task that was not run has none
            yield task, (numbers[-1], *map(_with_error, parts))


def _with_error(score: dict[str, Any]) -> str:
    return f"{score['score']:.3f} ± {score['standard_error']:.3f}" if score.get("n") else "–"


def _forgetting(run: RunRecords) -> Rows:
    before, after = (section_of(run.stage_scores, "forgetting", time) for time in ("before", "after"))
    for source in (source for source in after if source in before):
        yield source, (before[source], after[source], float(f"{after[source] - before[source]:.3f}"))


def meanings(run: RunRecords) -> list[str]:
    """Return what the scores mean, a paragraph each."""
    names, forgotten = list(dict(_all_scores(run))), list(_forgetting(run))
    return paragraphs(words()["tuning"], names=names, meanings=words()["tasks"], forgotten=forgotten, run=run)


def flat_groups(run: RunRecords) -> list[str]:
    """Return what the flat groups say."""
    found = _flat_groups(run)
    return paragraphs(words()["flat_groups"], flat=found) if found else []


def _flat_groups(run: RunRecords) -> dict[str, Any]:
    """Return whether all groups were flat, the share at the end, and the step from which on most were."""
    steps, shares = _over_steps(run, "flat_groups")
    if not len(steps):
        return {}
    below = np.flatnonzero(shares < MOSTLY_FLAT)
    first = 0 if not len(below) else below[-1] + 1
    all_flat = bool((run.step_values("flat_groups").values == 1).all())
    return {"all": all_flat, "share": shares[-1], "since": steps[first] if first < len(steps) else None}


def draw_reinforcement(runs: RunRecords | Sequence[RunRecords]) -> list[Picture]:
    """Draw what the steps of reinforcement recorded, the rules over the KL, and a reward model against a rule."""
    shown = [run for run in _several(runs) if run.stage == "rl"]
    drawn = [*_draw("reinforcement", shown, _over_steps), *_draw("rules", shown, _over_steps)]
    measured = [run for run in shown if run.step_values("kl").values.any()]
    over_kl = _draw("over-kl", measured, _over_kl, _KL, _mark_ends)
    return [*drawn, *_draw_proxy([run for run in measured if run.section("rl").get("reward_model")]), *over_kl]


def _draw_proxy(runs: Sequence[RunRecords]) -> list[Picture]:
    """Draw a panel for each run of a reward model: its score and rules over the KL, in the same unit and to scale."""
    drawn = [Panel(run.name, _SPREADS, lines) for run in runs if (lines := _proxy_and_rules(run))]
    values = [line.values for panel in drawn for line in panel.lines.values()]
    layout = (min(2, len(drawn)), (0.6, 2.6), functools.partial(_adjust_proxy, shown=values))
    return [pictures.draw_panels("proxy", drawn, *layout, over=_KL)] if drawn else []


def _adjust_proxy(axes: Axes, shown: Sequence[np.ndarray]) -> None:
    _mark_ends(axes)
    axes.axhline(0, color="#888888", linestyle="--", linewidth=1)
    axes.set_ylim(np.min(np.concatenate(shown)) - 0.1, np.max(np.concatenate(shown)) + 0.1)


def _proxy_and_rules(run: RunRecords) -> dict[str, Series]:
    """Return lines in standard deviations of the answers at the start, from their mean; none without the rules."""
    told, before = words()["pictures"]["proxy"]["lines"], section_of(run.stage_scores, "before")
    starts = {key: section_of(before, key).get("score", 0.0) for key in told if key != "reward"}
    lines = {key: _over_kl(run, key) for key in told}
    if not all(0 < start < 1 for start in starts.values()) or not all(line.is_there for line in lines.values()):
        return {}
    lines |= {key: _in_spreads(lines[key], start) for key, start in starts.items()}
    return {told[key]: line for key, line in lines.items()}


def _in_spreads(shares: Series, start: float) -> Series:
    """Return shares less the one at the start, in standard deviations of what is 1 in such a share and else 0."""
    return shares._replace(values=(shares.values - start) / (start * (1 - start)) ** 0.5)


def draw_preferences(runs: RunRecords | Sequence[RunRecords]) -> list[Picture]:
    """Draw how many pairs of a step were in the right order, and the loss."""
    return _draw("preferences", [run for run in _several(runs) if run.stage in ("reward", "dpo")], _over_steps)


def _several(runs: RunRecords | Sequence[RunRecords]) -> Sequence[RunRecords]:
    return [runs] if isinstance(runs, RunRecords) else runs


def _over_steps(run: RunRecords, key: str) -> Series:
    """Return a value over steps, as the mean of the newest twelfth of all steps."""
    found = [(line["step"], line[key]) for line in run.steps if line.get(key) is not None]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return Series(steps, values).smoothed(max(1, len(steps) // _N_PARTS))


def _over_kl(run: RunRecords, key: str) -> Series:
    """Return a value over the KL: of the first step, and the means of a twelfth of the steps each."""
    kl, values = run.step_values("kl"), run.step_values(key)
    if len(kl.values) != len(values.values):
        return Series(kl.values[:0], kl.values[:0])
    return Series(*(np.concatenate([line.values[:1], line.shortened(_N_PARTS).values]) for line in (kl, values)))


def _draw(
    name: str, runs: Sequence[RunRecords], lines_of: Lines, over: str = "step", adjust: Callable[[Axes], Any] = id
) -> list[Picture]:
    """Draw the panels of a picture that all runs have values for; no picture where there is none."""
    drawn = list[Panel]()
    for title, unit, key in words()["pictures"][name]["panels"]:
        lines = {run.name: lines_of(run, key) for run in runs}
        if lines and all(line.is_there for line in lines.values()):
            drawn.append(Panel(title, unit, lines))
    if not drawn:
        return []
    n_mean = max(1, len(runs[0].steps) // _N_PARTS)
    has_kl = all(run.step_values("kl").values.any() for run in runs)
    layout = (min(2, len(drawn)), (0.6, 1.75), adjust)
    return [pictures.draw_panels(name, drawn, *layout, over=over, n_mean=n_mean, has_kl=has_kl)]


def _mark_ends(axes: Axes) -> None:
    """Draw a large dot where each line ends."""
    for line in list(axes.lines):
        axes.plot(*np.asarray(line.get_data())[:, -1:], "o", markersize=6, color=line.get_color())
