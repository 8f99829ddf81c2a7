"""The engine: the law of equal bits, scheduling, limits, cancellation, failures, speculation."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine, Overloaded
from moe_gpt.inference.generate import generate
from moe_gpt.inference.request import Event, Request
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.inference.speculation import Draft, DraftModel, PromptLookup
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import tune_process

VOCAB_SIZE, CONTEXT = 97, 160
GREEDY = SamplingConfig(temperature=0)
SAMPLINGS = [
    GREEDY,
    SamplingConfig(temperature=1.1),
    SamplingConfig(temperature=0.8, top_k=20),
    SamplingConfig(temperature=1.0, top_p=0.9),
]
SHAPES = {
    "multi_query": {"n_heads": 2},
    "eight_heads": {"n_heads": 8, "head_dim": 8},
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "dense": {"n_experts": 1, "top_k": 1},
    "shared_attention": {"attention_sharing": 2, "tie_embeddings": True},
    "balance_by_bias": {"balance": "bias", "top_k": 3},
    "odd_widths": {"d_model": 30, "head_dim": 10, "n_heads": 3, "d_ff": 25},
    "wide": {"d_model": 768, "head_dim": 64, "n_heads": 12, "d_ff": 64},
}


@pytest.fixture(autouse=True)
def _as_loaded_with_one_thread():
    """Set the process up as ``moe_gpt.load`` does.

    The law is promised for one thread: with more, the library gives some threads fewer rows.
    """
    tune_process(torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(**changes: object) -> MoEGPT:
    """Return a model whose weights are large enough to make its predictions differ."""
    shape = {"vocab_size": VOCAB_SIZE, "n_layers": 2, "d_model": 32, "n_heads": 4, "head_dim": 16, "d_ff": 32}
    torch.manual_seed(0)
    model = MoEGPT(ModelConfig(**(shape | {"n_experts": 8, "max_seq_len": CONTEXT, "init_std": 0.15} | changes)))
    return model.eval()


def make_requests(n: int, seed: int = 0, longest: int = 100) -> list[Request]:
    """Return requests of mixed lengths and settings that report the log-probabilities of all that they get."""
    rng = random.Random(seed)
    return [
        Request(
            prompt=[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 17, 40, 64, 65, longest]))],
            max_new_tokens=rng.choice([1, 4, 12, 40]),
            sampling=rng.choice(SAMPLINGS),
            seed=index,
            n_logprobs=3,
            scores_prompt=rng.random() < 0.2,
        )
        for index in range(n)
    ]


def answers(engine: Engine, requests: Sequence[Request], arrivals: Sequence[int] | None = None) -> list[list[Event]]:
    """Return each request's events; a request is added before the step of its arrival."""
    left = sorted(range(len(requests)), key=lambda index: arrivals[index] if arrivals else 0)
    found, index_of, step = [[] for _ in requests], {}, 0
    while left or not engine.is_idle:
        while left and (not arrivals or arrivals[left[0]] <= step):
            index = left.pop(0)
            index_of[engine.add(requests[index])] = index
        for event in engine.step():
            found[index_of[event.request_id]].append(event._replace(request_id=0))
        step += 1
    return found


def facts(events: Sequence[Event]) -> list[tuple]:
    """Return what a request got in a form that ``==`` compares: log-probabilities to the last bit."""
    return [(event.token, event.text, event.finish, event.score, event.prompt_scores) for event in events]


def tokens(events: Sequence[Event]) -> list[int]:
    """Return the new tokens."""
    return [event.token for event in events if event.token is not None]


def check_the_law(
    model: MoEGPT,
    n_requests: int,
    n_schedules: int,
    seed: int,
    make_draft: Callable[[], Draft | None] = lambda: None,
    draft_alone: bool = False,
    **engine: object,
) -> int:
    """Compare requests alone with the same ones in random company; return how many comparisons differ by a bit.

    Alone they have no draft, unless a draft may change sampled answers.
    """
    rng, requests = random.Random(seed), make_requests(n_requests, seed)
    alone = []
    for request in requests:
        draft = make_draft() if draft_alone else None
        lonely = Engine(model, n_rows=1, chunk=CONTEXT, tokens_per_step=CONTEXT, draft=draft)
        alone.append(facts(answers(lonely, [request])[0]))
    n_wrong = 0
    for _ in range(n_schedules):
        sizes = {"n_rows": rng.choice([2, 3, 7, 14]), "chunk": rng.choice([1, 3, 7, 32, CONTEXT])}
        crowd = Engine(model, **sizes, tokens_per_step=rng.choice([1, 16, 64, 400]), draft=make_draft(), **engine)
        got = answers(crowd, requests, [rng.randrange(25) for _ in requests])
        n_wrong += sum(facts(events) != expected for events, expected in zip(got, alone, strict=True))
    return n_wrong


@pytest.mark.parametrize("shape", ["multi_query", "odd_widths"])
def test_what_a_request_gets_does_not_depend_on_its_company(shape):
    """Alone or in a crowd, however its prompt is cut: every token and log-probability has the same bits."""
    assert check_the_law(make_model(**SHAPES[shape]), 8, 2, seed=1) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_law_holds_for_hundreds_of_schedules(shape):
    """Eight shapes, 14 requests each, in 8 random schedules: 896 comparisons."""
    assert check_the_law(make_model(**SHAPES[shape]), 14, 8, seed=2) == 0


@pytest.mark.slow
def test_the_law_holds_where_mkl_multiplies_few_rows_otherwise():
    """MKL reads how it shall add before its first product; a program that has used torch by then gets more rows."""
    code = """
import torch
from test_engine import SHAPES, check_the_law, make_model
torch.set_num_threads(1)
print(check_the_law(make_model(**SHAPES["wide"]), 8, 2, seed=3), end="")
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "MKL_CBWR": "AUTO", "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0"


@pytest.mark.slow
def test_without_exactness_the_law_is_broken():
    """The ordinary way to compute fails the test above, so the test can fail."""
    assert check_the_law(make_model(), 8, 2, seed=1, is_exact=False) > 0


def test_the_law_holds_with_prompt_lookup():
    """Guesses change how many tokens a pass checks, and no bit of what a request gets, sampled ones included."""
    assert check_the_law(make_model(), 8, 2, seed=3, make_draft=lambda: PromptLookup(4, 1)) == 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_law_holds_with_a_draft_model(seed):
    """A sampled answer depends on the draft, and on nothing else: not on when the draft began to guess either."""
    smaller = make_model(n_layers=1, n_experts=1, top_k=1)
    draft = {"make_draft": lambda: DraftModel(smaller, 3, n_rows=14), "draft_alone": True}
    assert check_the_law(make_model(), 8, 2, seed=seed, **draft) == 0


def test_a_draft_that_serves_several_engines_remembers_nothing():
    """As ``generate`` with several samples does: each engine numbers its requests from 0."""
    model, smaller = make_model(), make_model(n_layers=1, n_experts=1, top_k=1)
    settings = {"max_new_tokens": 12, "sampling": SamplingConfig(temperature=1)}
    shared = DraftModel(smaller, 3, n_rows=1)
    for seed in range(3):
        request = Request(prompt=[seed], seed=seed, **settings)
        fresh = DraftModel(smaller, 3, n_rows=1)
        got, expected = (tokens(answers(Engine(model, n_rows=1, draft=d), [request])[0]) for d in (shared, fresh))
        assert got == expected


def test_prompts_that_begin_alike_share_their_keys():
    """The second of two prompts with the same beginning reads only the rest of it, and gets what it gets alone."""
    model, shared = make_model(), list(range(60))
    requests = [Request(prompt=[*shared, last], max_new_tokens=20, sampling=GREEDY, n_logprobs=2) for last in (1, 2)]
    alone = [facts(answers(Engine(model, reuse_prompts=False), [request])[0]) for request in requests]
    for arrivals in ([0, 5], [0, 40]):  # while the first runs, and after its end
        engine = Engine(model, n_rows=4, chunk=CONTEXT)
        got = answers(engine, requests, arrivals)
        assert [facts(events) for events in got] == alone
        n_read = int(engine.load.counts()[0].sum()) // 2  # top-2
        assert n_read == 61 + 19 + 1 + 19  # the second reads its last token only
    engine = Engine(model, n_rows=4, reuse_prompts=False)
    answers(engine, requests)
    assert int(engine.load.counts()[0].sum()) // 2 == 2 * (61 + 19)


def test_choices_of_one_prompt_read_it_once():
    """Of eight, the first reads 80 tokens, and each of the others one; all get what they get alone."""
    model, prompt = make_model(), list(range(80))
    requests = [Request(prompt=prompt, max_new_tokens=5, seed=seed, n_logprobs=1) for seed in range(8)]
    engine = Engine(model, n_rows=8, chunk=32)
    got = answers(engine, requests)
    assert int(engine.load.counts()[0].sum()) // 2 == 80 + 7 + 8 * 4
    assert [facts(events) for events in got] == [facts(answers(Engine(model), [each])[0]) for each in requests]


@pytest.mark.parametrize("shape", ["multi_query", "grouped", "dense"])
def test_greedy_tokens_are_those_of_generate(shape):
    """The engine and ``generate`` continue a prompt alike; sampled tokens with the same seed too."""
    model = make_model(**SHAPES[shape])
    requests = make_requests(12, seed=4)
    got = answers(Engine(model, n_rows=5), requests)
    for request, events in zip(requests, got, strict=True):
        expected = generate(model, request.prompt, request.max_new_tokens, request.sampling, request.seed)
        assert tokens(events) == list(expected)


def test_log_probabilities_are_those_of_the_model():
    """Of the prompt and of the answer, with the most likely alternatives, before temperature."""
    model = make_model()
    request = Request(prompt=[5, 6, 7, 8], max_new_tokens=3, n_logprobs=2, scores_prompt=True, seed=3)
    events = answers(Engine(model, chunk=2), [request])[0]
    text = [*request.prompt, *tokens(events)]
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0].log_softmax(-1)
    assert [event.prompt_scores for event in events[1:]] == [None, None]
    scores = events[0].prompt_scores + [event.score for event in events]
    assert [score.token for score in scores] == text
    assert scores[0].logprob is None
    for place, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(float(expected[place, score.token]), abs=1e-5)
        assert [token for token, _ in score.top] == expected[place].topk(2).indices.tolist()


def test_a_request_for_no_tokens_scores_the_prompt():
    """max_new_tokens 0 gives the prompt's log-probabilities, even where it fills the context."""
    request = Request(prompt=[1] * CONTEXT, max_new_tokens=0, n_logprobs=0, scores_prompt=True)
    (event,) = answers(Engine(make_model()), [request])[0]
    assert (event.token, event.finish, len(event.prompt_scores)) == (None, "length", CONTEXT)


def test_events_tell_the_experts_of_the_position_that_was_sampled_from():
    """They are the model's own routing of that position."""
    model = make_model()
    events = answers(Engine(model), [Request(prompt=[3, 1, 4], max_new_tokens=2, sampling=GREEDY)])[0]
    with torch.no_grad():
        routings = model.routings(torch.tensor([[3, 1, 4, events[0].token]]))
    for place, event in zip((2, 3), events, strict=True):
        assert event.experts.indices() == [routing.expert_indices[place].tolist() for routing in routings]


def test_an_answer_ends_at_end_of_text_at_its_limit_or_where_the_context_is_full():
    """End-of-text is not part of the answer."""
    model = make_model()
    free = tokens(answers(Engine(model), [Request(prompt=[5, 6], max_new_tokens=20, sampling=GREEDY)])[0])
    end = next(token for token in free if free.index(token) >= 2)
    requests = [
        Request(prompt=[5, 6], max_new_tokens=20, sampling=GREEDY, ends=[end]),
        Request(prompt=[5, 6], max_new_tokens=3, sampling=GREEDY),
        Request(prompt=[5] * (CONTEXT - 2), max_new_tokens=50, sampling=GREEDY),
    ]
    got = answers(Engine(model), requests)
    assert [events[-1].finish for events in got] == ["stop", "length", "length"]
    assert tokens(got[0]) == free[: free.index(end)]
    assert [len(tokens(events)) for events in got[1:]] == [3, 2]


def test_requests_wait_for_rows_and_too_many_are_refused():
    """Every accepted request ends, first come, first served; one more than rows and places to wait is refused."""
    engine = Engine(make_model(), n_rows=2, max_waiting=3)
    ids = [engine.add(Request(prompt=[7] * 5, max_new_tokens=4)) for _ in range(5)]
    with pytest.raises(Overloaded):
        engine.add(Request(prompt=[7], max_new_tokens=1))
    ends = [event.request_id for event in engine.run() if event.finish]
    assert ends == ids


def test_a_long_prompt_gets_its_turn_beside_many_that_decode():
    """Where decoding alone takes all tokens of a step, a chunk of a prompt still joins it."""
    engine = Engine(make_model(), n_rows=5, chunk=4, tokens_per_step=4)
    for _ in range(4):
        engine.add(Request(prompt=[1], max_new_tokens=100))
    engine.step()
    late = engine.add(Request(prompt=[2] * 40, max_new_tokens=1))
    steps = next(step for step in range(100) if any(event.request_id == late for event in engine.step()))
    assert steps == 9  # ten chunks of 4


def test_a_cancelled_request_gives_its_row_to_the_next():
    """Running or waiting, it ends at the next step; the others get what they get without it."""
    model, request = make_model(), Request(prompt=[5, 6], max_new_tokens=10, sampling=GREEDY)
    engine = Engine(model, n_rows=1)
    first, second, third = (engine.add(request) for _ in range(3))
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    events = list(engine.run())
    assert [(event.request_id, event.finish) for event in events[:2]] == [(second, "cancelled"), (first, "cancelled")]
    assert tokens(events) == list(generate(model, [5, 6], 10, GREEDY))
    assert {event.request_id for event in events[2:]} == {third}
    engine.cancel(third)  # has ended already
    assert engine.step() == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt=[]), "at least one token, got none"),
        (Request(prompt=[3, VOCAB_SIZE]), "from 0 to 96, got 97"),
        (Request(prompt=[-1]), "from 0 to 96, got -1"),
        (Request(prompt=[1] * CONTEXT), "shorter than the context of 160 tokens, got 160"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_served_are_refused(request_, message):
    """At once, with the limit and the value."""
    with pytest.raises(InputError, match=message):
        Engine(make_model()).add(request_)


def test_a_failing_pass_ends_its_own_requests_only():
    """The error reaches the requests of the pass; those that come later are served as ever."""
    model = make_model()
    engine = Engine(model, n_rows=2)
    ids = [engine.add(Request(prompt=[1, 2], max_new_tokens=5)) for _ in range(3)]
    handle = model.final_norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    events = engine.step()
    handle.remove()
    assert [(event.request_id, event.finish, event.error) for event in events] == [
        (ids[0], "error", "broken"),
        (ids[1], "error", "broken"),
    ]
    rest = list(engine.run())
    assert {event.request_id for event in rest} == {ids[2]}
    assert tokens(rest) == list(generate(model, [1, 2], 5))


def test_logits_that_are_not_finite_end_one_request_and_leave_nothing_in_its_row():
    """A prompt with the token of a damaged embedding fails; the next in its row gets what it gets alone."""
    model = make_model()
    expected = list(generate(model, [1, 2], 8, GREEDY))
    with torch.no_grad():
        model.embedding.weight[50] = torch.nan
    engine = Engine(model, n_rows=1)
    bad, good = (engine.add(Request(prompt=p, max_new_tokens=8, sampling=GREEDY)) for p in ([50] * 40, [1, 2]))
    events = list(engine.run())
    assert [event.finish for event in events if event.request_id == bad] == ["error"]
    assert "not finite" in events[0].error
    assert [event.token for event in events if event.request_id == good] == expected


def test_a_prompt_that_is_cancelled_halfway_leaves_nothing_in_its_row():
    """Nobody has seen yet whether its numbers are finite."""
    model = make_model()
    expected = list(generate(model, [1, 2], 8, GREEDY))
    with torch.no_grad():
        model.embedding.weight[50] = torch.nan
    engine = Engine(model, n_rows=1, chunk=4, tokens_per_step=4)
    bad, good = (engine.add(Request(prompt=p, max_new_tokens=8, sampling=GREEDY)) for p in ([50] * 40, [1, 2]))
    engine.step()
    engine.cancel(bad)
    assert [event.token for event in engine.run() if event.request_id == good] == expected


def test_the_engine_runs_in_bf16():
    """With another compute type the tokens come as ever; their bits are promised by nobody."""
    got = answers(Engine(make_model(), precision="bf16"), make_requests(4))
    assert all(events[-1].finish == "length" for events in got)


@pytest.mark.parametrize("n_guesses", [2, 4, 8])
def test_a_draft_model_leaves_greedy_answers_as_they_are(n_guesses):
    """Whatever the draft guesses, the tokens are those of plain decoding, for several requests at once."""
    model, draft = make_model(), make_model(n_layers=1, n_experts=1, top_k=1)
    requests = [r for r in make_requests(20, seed=5) if r.sampling.temperature == 0]
    plain = [facts(events) for events in answers(Engine(model, n_rows=4), requests)]
    speculating = Engine(model, n_rows=4, draft=DraftModel(draft, n_guesses, n_rows=4))
    assert [facts(events) for events in answers(speculating, requests, list(range(len(requests))))] == plain


def test_a_draft_that_is_the_model_itself_has_all_its_guesses_accepted():
    """Then 21 tokens take 1 pass of the prompt and 4 of five tokens each."""
    model = make_model()
    engine = Engine(model, draft=DraftModel(model, 4))
    engine.add(Request(prompt=[5, 6, 7], max_new_tokens=21, sampling=SamplingConfig(temperature=1)))
    n_steps = 0
    while not engine.is_idle:
        engine.step()
        n_steps += 1
    assert n_steps == 5


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["multi_query", "grouped", "dense"])
def test_the_engine_on_a_gpu_gives_the_greedy_tokens_of_a_cpu(shape):
    """In float32, for prompts of mixed lengths, with and without guesses."""
    model = make_model(**SHAPES[shape])
    requests = [dataclasses.replace(request, sampling=GREEDY) for request in make_requests(12, seed=6)]
    expected = [tokens(events) for events in answers(Engine(model), requests)]
    for draft in (None, PromptLookup(3, 1)):
        on_gpu = Engine(make_model(**SHAPES[shape]).to("cuda"), n_rows=4, draft=draft)
        assert [tokens(events) for events in answers(on_gpu, requests)] == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Engine(make_model(), n_rows=0), "n_rows must be"),
        (lambda: Engine("a run"), "needs a MoEGPT"),
        (lambda: Engine(make_model(), context=CONTEXT + 1), "context must be from 1 to the model's 160"),
        (lambda: Engine(make_model()).add(Request(prompt="def ")), "must be token ids, got 'def '"),
        (lambda: Engine(make_model()).add(Request(prompt=[1.5])), "must be token ids"),
        (lambda: Engine(make_model()).add(Request(prompt=[1], max_new_tokens=-3)), "max_new_tokens must be"),
        (lambda: Engine(make_model(), draft=DraftModel(make_model(vocab_size=50))), "vocabulary of 97 tokens, got 50"),
        (lambda: Engine(make_model(), n_rows=3, draft=DraftModel(make_model(), n_rows=2)), "rows as the engine, 3"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(make, message):
    """With the argument and what would be right."""
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("given", [{}, {"MKL_CBWR": "AVX2"}])
def test_the_package_asks_mkl_for_one_order_of_adding_unless_the_user_chose(given):
    """On Intel's processors; elsewhere it leaves MKL alone."""
    code = "import os, moe_gpt; print(os.environ.get('MKL_CBWR'), end='')"
    clean = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    environment = {**clean, "PYTHONPATH": str(Path(__file__).parents[2]), **given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    cpus = Path("/proc/cpuinfo")
    is_intel = cpus.is_file() and "GenuineIntel" in cpus.read_text()[:200]
    assert done.stdout == given.get("MKL_CBWR", "AUTO,STRICT" if is_intel else "None")
