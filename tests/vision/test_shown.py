"""Pictures in the engine: read once, seen by their own request alone, whatever shares its passes."""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest
import torch
from inference.test_engine import GREEDY, SAMPLINGS, answers, facts, make_requests, tokens
from tiny_seeing import SEE, give_eyes, noise, tiny_text_model

from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.request import Request
from moe_gpt.inference.speculation import DraftModel, PromptLookup
from moe_gpt.ops.device import tune_process
from moe_gpt.vision.cross_attention import CrossAttention, last_seen
from moe_gpt.vision.encoders import SmallEncoder
from moe_gpt.vision.shown import ShownPictures, encode

VOCAB_SIZE, CONTEXT = 97, 160


@pytest.fixture(autouse=True)
def _as_loaded_with_one_thread():
    """The law is promised for one thread."""
    tune_process(torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    """A mixture that sees."""
    return give_eyes(tiny_text_model(VOCAB_SIZE))


def shown(model, seeds: list[int], places: list[int]) -> ShownPictures:
    """Pictures of noise at these places."""
    pictures = [noise(seed) for seed in seeds]
    return ShownPictures(encode(model, pictures), places, str(seeds))


def looking_requests(model, n: int, seed: int) -> list[Request]:
    """Requests that begin alike and have other pictures, at other places; every third has none."""
    rng, requests = random.Random(seed), []
    for index in range(n):
        prompt = [7] * 20 + [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 8, 60]))]
        places = sorted(rng.sample(range(len(prompt)), rng.choice([1, 2, 3])))
        beside = shown(model, [rng.randrange(4) for _ in places], places) if index % 3 else None
        settings = {"sampling": rng.choice(SAMPLINGS), "scores_prompt": rng.random() < 0.3, "n_logprobs": 2}
        requests.append(
            Request(prompt=prompt, max_new_tokens=rng.choice([1, 6, 20]), seed=index, beside=beside, **settings)
        )
    return requests


def differences(model, n_requests: int, n_schedules: int, seed: int, **engine: object) -> int:
    """How many answers in random company differ by a bit from the same ones alone."""
    rng, requests = random.Random(seed), looking_requests(model, n_requests, seed)
    alone = [facts(answers(Engine(model, n_rows=1, chunk=CONTEXT), [request])[0]) for request in requests]
    n_wrong = 0
    for _ in range(n_schedules):
        sizes = {"n_rows": rng.choice([2, 5, 9]), "chunk": rng.choice([1, 3, 32])}
        crowd = Engine(model, **sizes, tokens_per_step=rng.choice([1, 64]), **engine)
        got = answers(crowd, requests, [rng.randrange(20) for _ in requests])
        n_wrong += sum(facts(events) != expected for events, expected in zip(got, alone, strict=True))
    return n_wrong


@pytest.mark.parametrize("every", [1, 2, 3])
@torch.no_grad()
def test_the_engine_sees_what_training_sees(every):
    """Log-probabilities of a prompt with two pictures, read in pieces, are those of one forward pass with a batch.

    Whatever blocks have cross-attention before them.
    """
    model = give_eyes(tiny_text_model(VOCAB_SIZE, n_layers=4), dataclasses.replace(SEE, every=every))
    assert len(model.cross.layers) == -(-4 // every)
    prompt, places = [random.Random(0).randrange(VOCAB_SIZE) for _ in range(30)], [4, 17]
    beside = shown(model, [1, 2], places)
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[0, places] = True
    with model.looking(model.seen(beside.features, [2], last_seen(mask))):
        right = model(torch.tensor([prompt])).logits.log_softmax(-1)[0]
    request = Request(prompt=prompt, max_new_tokens=0, n_logprobs=0, scores_prompt=True, beside=beside)
    scores = answers(Engine(model, chunk=7), [request])[0][0].prompt_scores
    for position, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(float(right[position, score.token]), abs=1e-5)


def test_what_a_request_with_pictures_gets_does_not_depend_on_its_company(model):
    """Alone or in a crowd with other pictures and with none, however its prompt is cut, with guesses or without."""
    assert differences(model, 7, 1, seed=1) == 0
    assert differences(model, 4, 1, seed=2, draft=PromptLookup(4, 1)) == 0
    assert differences(model, 7, 1, seed=1, is_exact=False) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2}, {"n_experts": 1, "top_k": 1}, {"d_model": 30, "head_dim": 10, "n_heads": 3}]
)
def test_the_law_holds_with_pictures_for_many_schedules(changes):
    """Four shapes, 12 requests each, in 6 random schedules."""
    assert differences(give_eyes(tiny_text_model(VOCAB_SIZE, **changes)), 12, 6, seed=3) == 0


def test_text_beside_pictures_gets_what_the_text_model_gives(model):
    """To the last bit, in the same passes as requests with pictures."""
    texts, text_model = make_requests(5, seed=4), tiny_text_model(VOCAB_SIZE)
    alone = [facts(answers(Engine(text_model, n_rows=1), [request])[0]) for request in texts]
    mixed = [request for pair in zip(texts, looking_requests(model, 5, 4), strict=True) for request in pair]
    got = answers(Engine(model, n_rows=10), mixed)
    assert [facts(events) for events in got[::2]] == alone


def test_equal_prompts_with_other_pictures_share_no_keys(model):
    """Nor with the same picture elsewhere, nor with none; with the same one they do, and get the same."""
    prompt = list(range(50))
    besides = [shown(model, [1], [3]), shown(model, [2], [3]), shown(model, [1], [4]), None, shown(model, [1], [3])]
    requests = [
        Request(prompt=prompt, max_new_tokens=8, sampling=GREEDY, n_logprobs=1, beside=each) for each in besides
    ]
    alone = [facts(answers(Engine(model, reuse_prompts=False), [request])[0]) for request in requests]
    assert len({str(each) for each in alone}) == 4
    for arrivals in ([0] * 5, [0, 30, 60, 90, 120]):
        engine = Engine(model, n_rows=8)
        assert [facts(events) for events in answers(engine, requests, arrivals)] == alone
        n_read = int(engine.load.counts()[0].sum()) // model.config.top_k
        assert n_read == 4 * 50 + 1 + 5 * 7


def test_pictures_are_read_once(model, monkeypatch):
    """Neither passes nor choices of an answer compute keys, or features, again."""
    beside = shown(model, [1, 2], [2, 5])
    requests = [Request(prompt=[1] * 40, max_new_tokens=12, seed=seed, beside=beside) for seed in range(3)]
    calls, keys_and_values = [], CrossAttention.keys_and_values
    monkeypatch.setattr(
        CrossAttention, "keys_and_values", lambda self, x: calls.append(self) or keys_and_values(self, x)
    )
    monkeypatch.setattr(SmallEncoder, "forward", lambda *_: pytest.fail("the encoder was called"))
    answers(Engine(model, chunk=4), requests)
    assert calls == [layer.attention for layer in model.cross.layers]


def test_a_picture_that_fails_ends_its_request(model, monkeypatch):
    """And the engine goes on."""
    engine, broken = Engine(model), shown(model, [1], [0])
    monkeypatch.setattr(broken, "keep", lambda _: 1 / 0)
    assert answers(engine, [Request(prompt=[1, 2], beside=broken)])[0][-1].finish == "error"
    assert tokens(answers(engine, [Request(prompt=[1, 2], max_new_tokens=3, beside=shown(model, [1], [0]))])[0])


def test_a_draft_guesses_without_pictures(model):
    """A smaller model need not see; greedy answers are those without it."""
    requests = [request for request in looking_requests(model, 6, 5) if request.sampling == GREEDY]
    assert any(request.beside for request in requests)
    expected = [tokens(events) for events in answers(Engine(model), requests)]
    draft = DraftModel(tiny_text_model(VOCAB_SIZE, n_layers=1, n_experts=1, top_k=1), 3)
    assert [tokens(events) for events in answers(Engine(model, draft=draft), requests)] == expected


@torch.no_grad()
def test_another_thread_with_the_same_model_sees_nothing(model):
    """While one thread's pass has pictures."""
    inputs, found = torch.arange(9)[None], []
    alone = model(inputs).logits
    kept = shown(model, [1], [0]).keep(model)
    span = type("Span", (), {"kept": kept, "start": 0, "position": 0, "n_tokens": 9})
    with kept.read_by(model, [span]):
        assert not model(inputs).logits.equal(alone)
        thread = threading.Thread(target=torch.no_grad()(lambda: found.append(model(inputs).logits)))
        thread.start()
        thread.join()
    assert found[0].equal(alone)
    assert model(inputs).logits.equal(alone)


def test_pictures_that_do_not_belong_are_refused(model):
    """A text model, other counts, places outside, features of another width."""
    good = shown(model, [1, 2], [0, 1])
    text, engine = Engine(tiny_text_model(VOCAB_SIZE)), Engine(model)
    with pytest.raises(InputError, match="this model sees no pictures"):
        text.add(Request(prompt=[1, 2, 3], beside=good))
    for places in ([0], [1, 0], [0, 3], [0, 0], [-1, 0], []):
        with pytest.raises(InputError, match="2 pictures must stand at as many tokens"):
            engine.add(Request(prompt=[1, 2, 3], beside=ShownPictures(good.features, places, "x")))
    with pytest.raises(InputError, match="must be 16 wide, got 7"):
        engine.add(Request(prompt=[1, 2, 3], beside=ShownPictures(torch.ones(1, 4, 7), [0], "x")))
    assert SEE.width == 16
