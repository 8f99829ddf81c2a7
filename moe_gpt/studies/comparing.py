"""What the rows of a study say about its comparisons: differences, intervals, tests, and verdicts in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_gpt.studies import statistics
from moe_gpt.studies.plan import EACH, MEAN, SPENT, ComparisonConfig, Moment
from moe_gpt.studies.results import Row, losses_of

_P = 0.05
_NAME = r"(?:(?P<source>.+)/)?(?P<measure>[^/]+)"


def scores_of(rows: Sequence[Row], at_tokens: int | None = None) -> pd.DataFrame:
    """Return the scores of all rows that count, with the columns arm, seed, source, measure and value.

    Scores of no source have the source ``EACH``. ``MEAN`` is the mean of the sources of a run.
    """
    found = [
        (row.run.arm, row.run.seed, *item) for row in rows if row.counts for item in row.scores_at(at_tokens).items()
    ]
    frame = pd.DataFrame(found, columns=["arm", "seed", "name", "value"])
    frame = frame.join(frame.pop("name").astype(str).str.extract(_NAME).fillna(EACH))
    of_sources = frame[frame.source != EACH]
    means = of_sources.groupby(["arm", "seed", "measure"], sort=False, as_index=False).value.mean()
    return pd.concat([frame, means.assign(source=MEAN)], ignore_index=True)


def spent_at(rows: Sequence[Row], loss: float) -> pd.DataFrame:
    """Return what runs had spent where a source's loss fell to ``loss``, with the columns of ``scores_of``.

    The place is interpolated between two evaluations. An arm with a run that does not reach the loss has no values.
    """
    found = [
        (row.run.arm, row.run.seed, source, measure, value)
        for row in rows
        if row.counts
        for source, tokens in _reached(row, loss).items()
        for measure, value in _spent(row, tokens).items()
    ]
    frame = pd.DataFrame(found, columns=["arm", "seed", "source", "measure", "value"])
    failed = {(row.arm, row.source) for row in frame[frame.value.isna()].itertuples()}
    return frame[[(row.arm, row.source) not in failed for row in frame.itertuples()]]


def _reached(row: Row, loss: float) -> dict[str, float]:
    """Return the tokens after which each source's loss, and the mean of them, falls to ``loss``; nan for never."""
    assert row.records, "the row counts"
    lines = row.records.records.evaluations
    tokens = [float(line["tokens_seen"]) for line in lines]
    curves = pd.DataFrame([losses_of(line) for line in lines], dtype=float)
    curves[MEAN] = curves.mean(axis="columns")
    return {str(source): _crossing(tokens, curves[source].cummin().to_numpy(), loss) for source in curves}


def _crossing(tokens: Sequence[float], lowest: np.ndarray, loss: float) -> float:
    return float(np.interp(-loss, -lowest, tokens)) if lowest[-1] <= loss else math.nan


def _spent(row: Row, tokens: float) -> dict[str, float]:
    """Return what a run had spent after so many tokens, interpolated between steps, where that is known."""
    assert row.records, "the row counts"
    seen = np.concatenate([[0.0], row.records.steps["tokens_seen"]])
    sums = row.records.sums | {"tokens": seen[1:], "steps": np.arange(1.0, len(seen))}
    return {name: float(np.interp(tokens, seen, [0.0, *sums[name]])) for name in SPENT if name in sums}


def values_of(scores: pd.DataFrame, measure: str, source: str) -> dict[str, list[float]]:
    """Return the values of each arm, one of each run."""
    found = scores[(scores.measure == measure) & (scores.source == source)]
    return {str(arm): values.tolist() for arm, values in found.groupby("arm", sort=False).value}


def spreads(scores: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the standard deviation of a run, pooled over arms, by source and measure, as prose/ce_loss."""
    names = scores[["source", "measure"]].drop_duplicates().itertuples(index=False)
    found = {f"{source}/{measure}": values_of(scores, measure, source) for source, measure in names}
    return {name: _spread(values) for name, values in found.items() if statistics.pooled_spread(values)}


def _spread(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    spread: Any = statistics.pooled_spread(values)
    return {**spread._asdict(), "own_variance": sorted(statistics.own_variance(values))}


def compare_arms(
    comparisons: Sequence[ComparisonConfig], scores: Mapping[Moment, pd.DataFrame], stale: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return the comparisons as values of table.json.

    Args:
        comparisons: as the study states them.
        scores: of ``scores_of`` or ``spent_at``, by the comparisons' moments.
        stale: names of stale runs.
    """
    pairs = [(each, scores[each.moment]) for each in comparisons]
    found = [_compared(each, source, frame) for each, frame in pairs for source in _sources(each, frame)]
    corrected = _corrected([entry[_deciding(entry)] for entry in found])
    for entry, p in zip(found, corrected, strict=True):
        is_stale = not {name.rpartition("-")[0] for name in stale}.isdisjoint(entry["arms"])
        entry |= {"p_holm": p, "verdict": _verdict(entry, p), "stale": is_stale}
    return found


def _corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct the p values that there are for their number."""
    corrected = iter(statistics.holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]


def _sources(comparison: ComparisonConfig, scores: pd.DataFrame) -> list[str]:
    found = scores[(scores.measure == comparison.measure) & (scores.source != MEAN)].source.unique().tolist()
    return found if found and comparison.source == EACH else [comparison.source]


def _deciding(entry: Mapping[str, Any]) -> str:
    """Return the key of the p value that decides about the claim."""
    return "p_equivalent" if entry["claim"] == "equivalent" else "p"


def _compared(comparison: ComparisonConfig, source: str, scores: pd.DataFrame) -> dict[str, Any]:
    """Return a comparison with the spread of all arms, or of its own two where one has a variance of its own."""
    values = values_of(scores, comparison.measure, source)
    first, second = (values.get(arm, []) for arm in comparison.arms)
    entry = vars(comparison) | {"arms": list(comparison.arms), "source": source, "seeds": [len(first), len(second)]}
    entry |= dict.fromkeys(("difference", "interval", "p", "p_equivalent", "detectable"))
    if first and second:
        has_own = statistics.own_variance(values) & set(comparison.arms)
        spread = None if has_own else statistics.pooled_spread(values)
        found = statistics.compare(first, second, spread)
        entry |= {"difference": found.difference, "interval": found.interval, "p": found.p}
        entry |= _equivalence(found, comparison.margin) | _power(spread, found, entry["seeds"])
    return entry


def _equivalence(found: statistics.Difference, margin: float | None) -> dict[str, Any]:
    return {"p_equivalent": statistics.equivalence_p(found, margin)} if margin else {}


def _power(spread: statistics.Spread | None, found: statistics.Difference, n_runs: Sequence[int]) -> dict[str, Any]:
    if spread is None or found.interval is None:
        return {}
    return {"detectable": statistics.detectable(spread.sd, n_runs[0], n_runs[1], df=spread.df)}


def _verdict(entry: Mapping[str, Any], p: float | None) -> str:
    """Return what may be said of the claim, and no more."""
    return "open" if p is None else _VERDICTS[entry["claim"]](entry, p < _P)


def _lower(entry: Mapping[str, Any], is_shown: bool) -> str:
    if entry["difference"] < 0:
        return _differs(entry, is_shown)
    return "not shown (it is higher)" if is_shown else "not shown"


def _equivalent(entry: Mapping[str, Any], is_shown: bool) -> str:
    (low, high), margin = entry["interval"], entry["margin"]
    if max(low, -high) > margin:
        return f"not shown (it differs by more than {margin:g})"
    return f"equivalent within {margin:g}" if is_shown else "not shown"


def _differs(entry: Mapping[str, Any], is_shown: bool) -> str:
    return "shown" if is_shown else "not shown"


_VERDICTS = {"lower": _lower, "equivalent": _equivalent, "differs": _differs}
