"""Whoever serves the same requests gives the same answers, and the counts of the bench are those of what happened."""

from __future__ import annotations

import json
import types
from importlib import metadata

import numpy as np
import pytest
import torch
from serving.served import make_model, make_service, serve
from small_runs import whole_run

from moe_gpt.bench import answering, clients, rounds
from moe_gpt.bench import serve as bench
from moe_gpt.bench.answering import FIRST, NAMES, ONE_BY_ONE, Subject
from moe_gpt.bench.clients import Streamed
from moe_gpt.commands.app import make_app
from moe_gpt.errors import InputError

OURS = [name for name in NAMES if not name.startswith("transformers")]


@pytest.fixture(scope="module")
def subject() -> Subject:
    """An untrained model with random tokens for prompts, which is also its own draft."""
    run = types.SimpleNamespace(model=make_model(300))
    texts = [np.random.default_rng(seed).integers(300, size=500) for seed in range(2)]
    return Subject("run", run, texts, run.model, rounds=1)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer and smaller measurements."""
    monkeypatch.setattr(bench, "N_REQUESTS", 8)
    monkeypatch.setattr(bench, "N_PASSES", 16)
    monkeypatch.setattr(bench, "_BATCH_SIZES", (1, 4))
    monkeypatch.setattr(answering, "BATCH", 3)


def take_turns_here(names, build, n_rounds, turns, warmup, at_once, say):
    """Let contenders take turns in this process: starting Python and torch for each takes seconds."""
    return {name: rounds.Turns([build(name)()], 0) for name in names}


def bench_engine_here(subject, monkeypatch, names):
    """Measure the engine in this process, without a run's folder."""
    monkeypatch.setattr(answering, "load_model", lambda path: subject.run)
    monkeypatch.setattr(bench, "take_turns", take_turns_here)
    monkeypatch.setattr(bench, "NAMES", names)
    return bench.bench_engine(subject, print)


@pytest.mark.slow
def test_every_way_of_ours_gives_the_same_answers(subject, monkeypatch):
    """In batches with padding too, whose answers come back in the order of the requests; ratios are of speeds."""
    results = bench_engine_here(subject, monkeypatch, OURS)
    assert [result["name"] for result in results] == [f"engine/{name}" for name in OURS]
    assert [result["same"] for result in results] == [1] * len(OURS)
    first, *others = results
    assert all(r["first_over"] == first["tokens_per_second"] / r["tokens_per_second"] for r in others)


@pytest.mark.slow
@pytest.mark.skipif(int(metadata.version("transformers").partition(".")[0]) < 5, reason="no generate_batch")
def test_transformers_gives_the_same_answers(subject, monkeypatch):
    """In fixed batches and with its continuous batching."""
    results = bench_engine_here(subject, monkeypatch, [FIRST, ONE_BY_ONE, *(set(NAMES) - set(OURS))])
    assert [result["same"] for result in results] == [1] * 4


def test_answers_that_differ_are_counted(subject):
    """As the share of those that are the same."""
    answered = answering.Answered(2.0, [[1, 2], [3], [4]])
    assert answered.share_equal([[1, 2], [5], [4]]) == pytest.approx(2 / 3)
    assert answered.speed == 2


def test_requests_are_of_the_texts_and_fit(subject):
    """Prompts stand in a text, prompt and answer fit the context, and a seed makes the same ones again."""
    requests = subject.requests(40, (8, 400), seed=3)
    text = " ".join(" ".join(map(str, tokens)) + " |" for tokens in subject.texts)
    assert all(" ".join(map(str, request.prompt)) in text for request in requests)
    assert {len(request.prompt) + request.max_new_tokens <= subject.context for request in requests} == {True}
    assert requests == subject.requests(40, (8, 400), seed=3) != subject.requests(40, (8, 400), seed=4)


def test_expected_experts_by_hand():
    """An expert that all choose counts once; two that each takes half of the tokens count 1.5 for two tokens."""
    assert bench.expected_experts(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 2) == (1 + 1.5) / 2


def test_experts_are_counted_from_passes(subject):
    """One request reads top_k experts; four read more, at most all; passes that read prompts are left out."""
    one, four = bench.bench_experts(subject, print)
    assert one["passes"] == four["passes"] == 16
    assert one["touched"] == one["uniform"] == subject.run.model.config.top_k
    assert one["expected"] == pytest.approx(one["touched"])
    assert one["touched"] < four["touched"] <= 8
    assert four["expected"] < four["uniform"] == 8 * (1 - 0.75**4)


def test_dense_model_has_no_experts(subject):
    """It is refused with what to do."""
    dense = types.SimpleNamespace(model=make_model(300))
    dense.model.config = types.SimpleNamespace(is_dense=True)
    with pytest.raises(InputError, match="leave experts out of --only"):
        bench.bench_experts(subject._replace(run=dense), print)


@pytest.mark.slow
def test_guesses_are_counted(subject, monkeypatch):
    """The model as its own draft guesses right: k + 1 tokens a pass, but where an answer ends; without, it is 1."""
    monkeypatch.setattr(bench, "_GUESSES", (3,))
    results = {result["name"]: result for result in bench.bench_speculation(subject, print)}
    plain, lookup, draft = (results[f"speculation/T=0, {name}"] for name in ("nothing", "lookup, 3", "draft, 3"))
    assert (plain["accepted"], plain["tokens_per_pass"]) == (0, 1)
    assert draft["accepted"] == 1
    assert draft["tokens_per_pass"] == pytest.approx(127 / 32)  # 31 passes of 4 tokens, one of 3
    assert 0 <= lookup["accepted"] < 1
    assert [r["same"] for name, r in results.items() if "draft" not in name] == [1] * 6
    assert results["speculation/T=0, generate"]["over_generate"] == 1


def test_clients_read_what_the_engine_says(subject):
    """Over real sockets, in the order of the questions, however many ask; tokens are counted by the server."""
    service = make_service({"n_rows": 4})
    requests = subject.requests(6, (5, 20), temperature=0.8)
    expected = answering.by_engine(make_model(service.tokenizer.vocab_size), requests)
    with serve(service) as url:
        port = int(url.rpartition(":")[2])
        seconds, answers = clients.ask_all(port, [bench._body(r) | {"model": "small"} for r in requests], 3)
        with pytest.raises(InputError, match="got .*'other' is not served"):
            clients.ask_all(port, [bench._body(requests[0]) | {"model": "other"}], 1)
    assert [each.text for each in answers] == list(map(service.tokenizer.decode, expected))
    assert [each.n_tokens for each in answers] == list(map(len, expected))
    assert 0 < sum(answers[0].gaps) < seconds


def test_figures_of_clients_by_hand():
    """First pieces and later ones are told apart, and an answer without text counts for neither."""
    answer, empty = Streamed("ab", 2, [0.0, 1.0, 3.0]), Streamed("", 0, [0.0])
    found = bench._streamed(2, [(4.0, [answer, answer, empty])] * 3, 2.0, ["ab", "no", ""])
    assert found["first_token_p50_p95"] == (1, 1)
    assert found["between_tokens_p50_p95"] == (2, 2)
    assert (found["tokens_per_second"], found["of_engine"]) == (1, 0.5)
    assert (found["requests_per_second"], found["same"]) == (0.75, pytest.approx(2 / 3))


def test_picture_needs_experts(subject, tmp_path):
    """It is drawn from their results, and refused without."""
    bench.plot(bench.bench_experts(subject, print), tmp_path / "experts.svg")
    assert "<svg" in (tmp_path / "experts.svg").read_text()
    with pytest.raises(InputError, match="--only must have experts"):
        bench.plot([], tmp_path / "none.svg")


def test_unknown_part_is_refused_before_anything_is_loaded():
    """With those there are."""
    with pytest.raises(InputError, match="among engine, server, experts, speculation, got speed"):
        bench.bench_serve("nowhere", ["engine", "speed"], None, 1, print)


@pytest.mark.slow
def test_whole_bench_of_a_run(small_config, tmp_path, monkeypatch):
    """All parts run on a run's own text, with a server in a process of its own; the file has every result."""
    monkeypatch.setattr(bench, "take_turns", take_turns_here)
    monkeypatch.setattr(bench, "NAMES", OURS)
    monkeypatch.setattr(bench, "_CLIENTS", (1, 4))
    run, file, picture = str(whole_run(small_config)), tmp_path / "serve.json", tmp_path / "experts.svg"
    make_app()(["bench", "serve", run, "--draft", run, "--rounds", "1", "--json", str(file), "--plot", str(picture)])
    results = json.loads(file.read_text())["results"]
    assert {result["name"].partition("/")[0] for result in results} == set(bench.PARTS)
    assert [result["same"] for result in results if result["name"].startswith(("engine", "server"))] == [1] * 8
    assert picture.is_file()


@pytest.mark.slow
def test_server_that_does_not_start_is_told_of(tmp_path):
    """With its own last words."""
    with pytest.raises(InputError, match="does not start: .*no complete checkpoint"), clients.served(str(tmp_path)):
        pass
