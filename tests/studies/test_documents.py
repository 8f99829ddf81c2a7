"""Intervals over documents: of the same text as the evaluations, and as wide as other documents make them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import moe_gpt
from moe_gpt.data.prepare import prepare_data
from moe_gpt.errors import InputError
from moe_gpt.studies.documents import OfDocuments, over_documents, score_run, write_documents
from moe_gpt.studies.plan import load_study
from moe_gpt.studies.results import look
from moe_gpt.studies.tables import write_tables


def test_losses_of_documents_are_those_of_the_evaluation(finished_runs):
    """Together they are its loss."""
    run = finished_runs / "moe-0"
    loaded = moe_gpt.load(run)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = score_run(loaded)
    assert sorted(found) == ["code", "prose"]
    for name, of_source in found.items():
        assert of_source.nats.sum() / of_source.n_tokens.sum() == pytest.approx(last[f"val/{name}/ce_loss"], rel=1e-5)


def test_a_document_ends_with_its_end_of_text(finished_runs):
    """So the tokens of each are those between two of them."""
    loaded = moe_gpt.load(finished_runs / "moe-0")
    data = dataclasses.replace(loaded.run_config.data, validation_tokens=20_000)
    found = score_run(dataclasses.replace(loaded, run_config=dataclasses.replace(loaded.run_config, data=data)))
    (tokens,) = [
        source.validation.tokens
        for source in prepare_data(data, loaded.tokenizer).sources
        if source.config.name == "prose"
    ]
    ends = np.flatnonzero(np.asarray(tokens) == loaded.tokenizer.end_of_text_id)
    whole = np.diff([0, *ends])[: len(found["prose"].n_tokens) - 1]
    assert len(whole) > 1
    assert found["prose"].n_tokens[:-1].tolist() == whole.tolist()


@pytest.mark.slow
def test_differences_over_documents_are_those_of_the_table(study_values, write_study, out):
    """The same differences as over seeds, each once, which the tables then have with their intervals."""
    again = [*study_values["comparisons"], {"name": "their mean", "arms": ["dense", "moe"], "source": "mean"}]
    study = load_study(write_study(comparisons=again), out)
    told = write_documents(study, say=lambda line: None)
    _, text = write_tables(study)
    compared = json.loads((out / "table.json").read_text())["comparisons"]
    assert [entry["source"] for entry in told] == ["prose", "code"]
    for entry, other in zip(told, compared, strict=False):
        assert entry["difference"] == pytest.approx(other["difference"], abs=1e-5)
    assert "Over documents" in (out / "study.html").read_text()
    assert f"{told[0]['difference']:+.4f}" in text


def test_a_study_without_finished_comparisons_has_no_documents(write_study, tmp_path):
    """It says for what they are."""
    study = load_study(write_study(), tmp_path / "empty")
    with pytest.raises(InputError, match="documents are for such comparisons"):
        write_documents(study)
    assert len(look(study)) == 4


def test_intervals_cover_what_other_documents_would_say():
    """Of 300 sets of 40 documents of all lengths, about 95 % of the intervals have the difference of all text."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(300):
        n_tokens = rng.lognormal(6, 1, 40).astype(int) + 1
        nats = n_tokens * rng.normal(-0.05, 0.1, 40)
        first = OfDocuments(4.0 * n_tokens, n_tokens)
        found = over_documents(first, OfDocuments(first.nats + nats, n_tokens), seed)
        low, high = found["interval"]
        covered += low < -0.05 < high
    assert 0.85 < covered / 300 < 0.98


def test_few_documents_have_no_interval():
    """Four documents drawn again are nearly the same four."""
    few = OfDocuments(np.ones(4), np.full(4, 2))
    assert over_documents(few, few) == {"difference": 0.0, "interval": None, "documents": 4}
