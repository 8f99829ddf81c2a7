"""Differences over held-out documents: would other text of the same kind say the same?

The seeds of a study share their held-out text, so its intervals over seeds say nothing about other text. Here the
documents are drawn again, with replacement (the bootstrap of Efron, 1979), and the losses are means over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from moe_gpt.api.loaded import LanguageModel, load
from moe_gpt.data.prepare import prepare_data
from moe_gpt.data.stream import Batch, validation_rows
from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.ops.device import autocast
from moe_gpt.studies.plan import EACH, MEAN, ComparisonConfig, Study
from moe_gpt.studies.results import Row, look, of_arms
from moe_gpt.studies.statistics import LEVEL

_N_DRAWS = 2000
_FEWEST = 5
"""Documents; with fewer, drawing them again says little."""


class OfDocuments(NamedTuple):
    """What a model makes of the held-out documents of a source; the last one may be cut."""

    nats: np.ndarray
    """Summed cross entropy of each document's tokens (D,)."""
    n_tokens: np.ndarray
    """Scored tokens of each (D,)."""


Scored = dict[str, dict[str, OfDocuments]]
"""By arm and source, the nats as means over seeds."""


def write_documents(study: Study, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Score the runs of all comparisons of losses and write documents.json, which the tables then have; return it.

    Args:
        study: as it is planned.
        say: told of each run.

    Raises:
        InputError: where no comparison is one of losses at the end of runs that have come there.
    """
    claims = list(filter(is_of_losses, study.config.comparisons))
    scored = {arm: _of_arm(rows, say) for arm, rows in _finished(study, claims).items()}
    told: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in (entry for each in claims if scored.keys() >= {*each.arms} for entry in _compared(each, scored)):
        told.setdefault((*entry["arms"], entry["source"]), entry)  # a comparison of the mean has the same documents
    if not told:
        raise InputError("no comparison is of ce_loss at the end of finished runs; documents are for such comparisons")
    replace_file(study.documents, json.dumps(list(told.values()), indent=2) + "\n")
    return list(told.values())


def _finished(study: Study, claims: Sequence[ComparisonConfig]) -> dict[str, list[Row]]:
    """Return the rows that count of the arms that are compared, where there are some."""
    rows = [row for row in look(study) if row.counts]
    found = {arm: of_arms(rows, arm) for each in claims for arm in each.arms}
    return {arm: of_arm for arm, of_arm in found.items() if of_arm}


def is_of_losses(comparison: ComparisonConfig) -> bool:
    """Whether a comparison is of the losses at the end."""
    return comparison.measure == "ce_loss" and comparison.at_tokens is None


def _of_arm(rows: Sequence[Row], say: Callable[[str], None]) -> dict[str, OfDocuments]:
    found = []
    for row in rows:
        say(f"scoring the documents of {row.run.name}")
        found.append(score_run(load(row.run.folder)))
    return {
        name: OfDocuments(np.mean([run[name].nats for run in found], axis=0), found[0][name].n_tokens)
        for name in found[0]
    }


def score_run(loaded: LanguageModel) -> dict[str, OfDocuments]:
    """Return what a run's model makes of the documents that its evaluations read, by source."""
    config = loaded.run_config
    assert config, "a run has a config"
    data = prepare_data(config.data, loaded.tokenizer)
    length, most = max(stage.seq_len for stage in config.schedule.stages), config.data.validation_tokens
    texts = {source.config.name: source.validation.tokens for source in data.sources if len(source.validation.tokens)}
    at_once = max(1, config.train.micro_batch_tokens // length)
    return {
        name: _of_rows(loaded, validation_rows(tokens, length, most), data.tokenizer.end_of_text_id, at_once)
        for name, tokens in texts.items()
    }


@torch.inference_mode()
def _of_rows(loaded: LanguageModel, rows: Batch, end_id: int, at_once: int) -> OfDocuments:
    device, nats = loaded.model.embedding.weight.device, list[Tensor]()
    parts = (torch.from_numpy(part).to(device).split(at_once) for part in (rows.inputs, rows.targets))
    for inputs, targets in zip(*parts, strict=True):
        with autocast(device, loaded.precision):
            logits = loaded.model(inputs).logits.float()
        nats.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").cpu())
    document = np.cumsum(rows.inputs.ravel() == end_id)  # what follows an end belongs to the next document
    document -= document[0]
    return OfDocuments(np.bincount(document, torch.cat(nats).double().numpy()), np.bincount(document))


def _compared(comparison: ComparisonConfig, scored: Scored) -> list[dict[str, Any]]:
    first, second = (scored[arm] for arm in comparison.arms)
    names = first if comparison.source in (EACH, MEAN) else [comparison.source]
    facts = {"name": comparison.name, "arms": list(comparison.arms)}
    return [facts | {"source": name} | over_documents(first[name], second[name]) for name in names]


def over_documents(first: OfDocuments, second: OfDocuments, seed: int = 0) -> dict[str, Any]:
    """Return the difference of two arms on a source in nats per token, with its interval over documents.

    The interval is the 95 % percentile interval of the paired bootstrap; None for fewer than five documents.

    Args:
        first: of the arm that the second one is held against.
        second: of the same documents.
        seed: of the draws.
    """
    nats, n_tokens = second.nats - first.nats, first.n_tokens
    told = {"difference": float(nats.sum() / n_tokens.sum()), "interval": None, "documents": len(nats)}
    if len(nats) < _FEWEST:
        return told
    drawn = stats.bootstrap(
        (nats, n_tokens),
        lambda x, n, axis: x.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_N_DRAWS,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return told | {"interval": [float(edge) for edge in drawn.confidence_interval]}
