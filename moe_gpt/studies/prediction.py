"""The prediction of a study's held-out run: written before that run may start, and compared with it afterwards."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd

from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.studies.comparing import scores_of, values_of
from moe_gpt.studies.law import predict
from moe_gpt.studies.plan import LawConfig, Planned, Study
from moe_gpt.studies.results import Row, look, names_of, of_arms


def write_prediction(study: Study) -> dict[str, Any]:
    """Predict the held-out run from the finished ladder, and write prediction.json; return what it has.

    Raises:
        InputError: where the study has no law, the ladder is not finished, or the held-out run has started.
    """
    law, rows = study.config.law, look(study)
    if not law:
        raise InputError("law is required to predict: law: {ladder: [arms], held_out: ARM}")
    ladder = of_arms(rows, *law.ladder)
    _check(law, ladder)
    target, losses = _target(law, rows), list(itertools.chain(*_losses(law, ladder).values()))
    compute = [row.totals["flops"] for row in ladder]
    found = predict(compute, losses, target)
    told = found._asdict() | {
        "law": found.law._asdict(),
        "target_flops": target,
        "points": [[row.run.name, *point] for row, *point in zip(ladder, compute, losses, strict=True)],
        "digest": hashlib.sha256(json.dumps([row.fingerprint for row in ladder]).encode()).hexdigest(),
        "predicted_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    replace_file(study.prediction, json.dumps(told, indent=2) + "\n")
    return told


def _check(law: LawConfig, ladder: Sequence[Row]) -> None:
    unfinished = names_of(ladder, "stale", "failed", "running", "missing")
    if unfinished:
        raise InputError(f"law.ladder must be finished to predict; {', '.join(unfinished)} is not")
    if not _losses(law, ladder):
        raise InputError(f"law.source: evaluations of the ladder have no {law.measure} of {law.source}")


def _losses(law: LawConfig, rows: Sequence[Row]) -> dict[str, list[float]]:
    return values_of(scores_of(rows), law.measure, law.source)


def _target(law: LawConfig, rows: Sequence[Row]) -> float:
    """Return the FLOPs of the held-out run, which has not started."""
    held_out = of_arms(rows, law.held_out)
    if any(row.started_at for row in held_out):
        raise InputError(f"law.held_out: {law.held_out} has started, so that it is too late to predict it")
    return _planned_flops(held_out[0].run)


def _planned_flops(run: Planned) -> int:
    if run.config.schedule.stages[-1].end is None:
        raise InputError("law.held_out needs until_tokens in the last one of schedule.stages, got null")
    return run.flops


def told_of_law(study: Study, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the prediction with what became of it, for table.json; None where the study has no law."""
    law = study.config.law
    if not law:
        return None
    if not study.prediction.is_file():
        return {"held_out": law.held_out, "predicted_at": None}
    told = json.loads(study.prediction.read_text(encoding="utf-8"))
    held_out = of_arms(rows, law.held_out)
    started_at = min(filter(None, (row.started_at for row in held_out)), default=None)
    times = {"started_at": started_at, "is_before": told["predicted_at"] <= (started_at or told["predicted_at"])}
    losses = _losses(law, held_out).get(law.held_out)
    return told | {"held_out": law.held_out, "found": None} | times | (_outcome(told, losses) if losses else {})


def _outcome(told: dict[str, Any], losses: Sequence[float]) -> dict[str, Any]:
    """Return how far the law and its rival without a floor are from the mean of losses, as shares of it."""
    loss, points = statistics.fmean(losses), pd.DataFrame(told["points"], columns=["run", "flops", "loss"])
    improvement = points[points.flops == points.flops.max()].loss.mean() - loss
    return {
        "found": loss,
        "error": (told["loss"] - loss) / loss,
        "power_law_error": (told["power_law"] - loss) / loss,
        "error_of_improvement": (told["loss"] - loss) / improvement if improvement else None,
    }
