"""The measurement of preparing and reading data: both sides do the same work."""

from __future__ import annotations

import itertools
import json

import pytest

from moe_gpt.bench import data as bench
from moe_gpt.bench.processes import Measured
from moe_gpt.config.yaml import load_run_config
from moe_gpt.data.builtin_corpus import iterate_builtin


def test_corpus_has_the_size_asked_for(tmp_path, monkeypatch):
    """Documents come again, in another order, until it has."""
    texts = ["x" * 50 + str(i) for i in range(9)]
    monkeypatch.setattr(bench, "iterate_builtin", lambda kind: [type("D", (), {"text": text}) for text in texts])
    n_documents = bench.write_corpus(tmp_path / "c.jsonl", 5000)
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    assert n_documents == len(lines)
    assert 5000 <= (tmp_path / "c.jsonl").stat().st_size < 5100
    passes = [[json.loads(line)["text"] for line in lines[start : start + 18]] for start in (0, 18)]
    assert sorted(passes[0]) == sorted(texts * 2) == sorted(passes[1])
    assert passes[0] != passes[1]


@pytest.mark.slow
def test_both_sides_make_the_same_number_of_tokens(small_values, tmp_path, monkeypatch):
    """So the ratio compares the same work; every result has its name and figures, and is told."""
    import yaml

    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_values), encoding="utf-8")
    monkeypatch.setattr(bench, "_TRAIN_STEPS", 1)
    # some of the corpus, and all in this process
    monkeypatch.setattr(bench, "iterate_builtin", lambda kind: itertools.islice(iterate_builtin(kind), 20))
    monkeypatch.setattr(bench, "available_cores", lambda: 1)
    monkeypatch.setattr(bench, "measure", lambda work, *arguments: Measured(1.0, 1, work(*arguments)))
    said: list[str] = []
    results = bench.bench_data(load_run_config(str(tmp_path / "small.yaml")), 0.0005, tmp_path, said.append)
    ours, theirs, stream, training = results
    assert [result["name"] for result in results] == [
        "prepare/moe_gpt", "prepare/datasets.map", "stream/moe_gpt", "train/moe_gpt",
    ]  # fmt: skip
    assert ours["tokens"] == theirs["tokens"] > 100_000
    assert all(result["tokens_per_second"] > 0 for result in results)
    assert stream["seconds_to_first_batch"] > 0
    assert len(said) == 6
    assert f"ratio {stream['tokens_per_second'] / training['tokens_per_second']:.0f}" in said[-1]
