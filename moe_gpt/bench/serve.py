"""Serving measured: engine, server, experts that a pass reads, speculation: ``moe-gpt bench serve``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_gpt.bench.answering import NAMES, ONE_BY_ONE, Answered, Counted, Subject, held_out, make_answerer
from moe_gpt.bench.clients import Streamed, ask_all, served
from moe_gpt.bench.results import Result, tabulate
from moe_gpt.bench.rounds import Turns, require, take_turns
from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.request import Request
from moe_gpt.inference.speculation import Draft, DraftModel, NoDraft, PromptLookup
from moe_gpt.ops.device import tune_process
from moe_gpt.training.saving.saved_model import load_model

N_REQUESTS, N_PASSES = 64, 304
_BATCH_SIZES, _CLIENTS, _GUESSES = (1, 2, 4, 8, 16, 32, 64), (1, 8, 32, 64), (2, 4, 8)
Say = Callable[[str], None]


def bench_serve(run: str, only: Sequence[str], draft: str | None, rounds: int, say: Say) -> list[Result]:
    """Measure parts of serving a run, on a CPU in float32, with prompts of 8 to 127 tokens of its held-out text.

    Args:
        run: the folder of a run, or a checkpoint.
        only: parts to measure, of ``PARTS``.
        draft: a run with the same tokenizer, whose model guesses tokens.
        rounds: turns that each contender gets.
        say: shows tables.

    Raises:
        InputError: where there is no such part, or the run holds out no text.
    """
    if unknown := set(only) - PARTS.keys():
        raise InputError(f"--only must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    tune_process(torch.device("cpu"))
    loaded = load_model(run)
    subject = Subject(run, loaded, held_out(loaded, say), load_model(draft).model if draft else None, rounds)
    say(f"{torch.get_num_threads()} threads (OMP_NUM_THREADS)")
    results: list[Result] = []
    for part in only:
        found = PARTS[part](subject, say)
        say(tabulate(found, _COLUMNS[part]))
        results += found
    return results


def bench_engine(subject: Subject, say: Say) -> list[Result]:
    """Let all ``NAMES`` answer the same greedy requests for 8 to 72 tokens, in turns."""
    requests = subject.requests(N_REQUESTS, (8, 72))
    make = functools.partial(make_answerer, subject.path, requests)
    turns = take_turns(NAMES, make, subject.rounds, turns=1, warmup=1, at_once=True, say=say)
    require(turns, NAMES[0])
    require(turns, ONE_BY_ONE)
    expected = turns[ONE_BY_ONE].values[0].tokens
    return [_answered(name, turned, turns[NAMES[0]], expected) for name, turned in turns.items() if turned.values]


def _answered(name: str, turns: Turns, first: Turns, expected: list[list[int]]) -> Result:
    return {
        "name": f"engine/{name}",
        "tokens_per_second": turns.median("speed"),
        "first_over": first.median("speed") / turns.median("speed"),
        "same": min(answered.share_equal(expected) for answered in turns.values),
    }


def bench_server(subject: Subject, say: Say) -> list[Result]:
    """Let clients stream answers of 48 tokens from a server with 32 rows, in turns with the bare engine.

    Each client asks four times, but all together 16 times at least. The engine gets the requests of 32 clients.
    """
    requests = subject.requests(4 * N_REQUESTS, (48, 48), temperature=0.8)
    ends = (subject.run.tokenizer.end_of_text_id,)  # as the server's
    asked = [dataclasses.replace(request, ends=ends) for request in requests[: 4 * 32]]
    bare, streamed = list[Answered](), {n: list[tuple[float, list[Streamed]]]() for n in _CLIENTS}
    with served(subject.path) as port:
        ask_all(port, [_body(each) for each in asked], 32)  # it may still be starting
        for _ in range(subject.rounds):
            bare.append(subject.answered(asked, n_rows=32))
            for n, rounds in streamed.items():
                rounds.append(ask_all(port, [_body(each) for each in requests[: max(4 * n, 16)]], n))
    speed = statistics.median(each.speed for each in bare)
    texts = [subject.run.tokenizer.decode(tokens) for tokens in bare[0].tokens]
    return [_streamed(n, rounds, speed, texts) for n, rounds in streamed.items()]


def _body(request: Request) -> dict[str, Any]:
    settings = {"temperature": request.sampling.temperature, "seed": request.seed}
    return {"model": "run", "prompt": request.prompt, "max_tokens": request.max_new_tokens} | settings


def _streamed(n: int, rounds: list[tuple[float, list[Streamed]]], engine_speed: float, texts: list[str]) -> Result:
    """Return what the answers to n clients say; ``texts`` are those of the bare engine."""
    answers = [each for _, found in rounds for each in found]
    seconds, n_requests = statistics.median(seconds for seconds, _ in rounds), len(rounds[0][1])
    speed = sum(each.n_tokens for each in answers[:n_requests]) / seconds
    return {
        "name": f"server/{n} clients",
        "clients": n,
        "requests_per_second": n_requests / seconds,
        "tokens_per_second": speed,
        "of_engine": speed / engine_speed,
        "first_token_p50_p95": _percentiles(each.gaps[:1] for each in answers),
        "between_tokens_p50_p95": _percentiles(each.gaps[1:] for each in answers),
        "same": statistics.fmean(map(str.__eq__, texts, [each.text for each in answers[:n_requests]])),
    }


def _percentiles(gaps: Iterable[list[float]]) -> tuple[float, float]:
    cuts = statistics.quantiles(itertools.chain.from_iterable(gaps), n=20)
    return cuts[9], cuts[18]


def bench_experts(subject: Subject, say: Say) -> list[Result]:
    """Count the experts of a layer that passes read in which B requests decode, beside what loads let expect."""
    model = subject.run.model.config
    if model.is_dense:
        raise InputError("a dense model has no experts to count (model.n_experts is 1); leave experts out of --only")
    chosen = {B: torch.cat(list(_passes(subject, B))) for B in _BATCH_SIZES}  # (passes, B, L, E)
    shares = torch.cat([each.flatten(0, 1) for each in chosen.values()]).double().mean(0)
    return [
        {
            "name": f"experts/{B}",
            "batch_size": B,
            "passes": len(each),
            "touched": each.any(1).sum(-1).double().mean().item(),
            "expected": expected_experts(shares, B),
            "uniform": expected_experts(torch.full_like(shares, model.top_k / model.n_experts), B),
        }
        for B, each in chosen.items()
    ]


def expected_experts(shares: Float[Tensor, "L E"], n_tokens: int) -> float:
    """Return Σ_e 1 - (1 - p_e)^B, in the mean over layers: how many experts B independent tokens choose.

    A token misses expert e with probability 1 - p_e, where p_e is the share of tokens that choose it.
    """
    return (1 - (1 - shares) ** n_tokens).sum(-1).mean().item()


def _passes(subject: Subject, n_requests: int) -> Iterator[Bool[Tensor, "1 B L E"]]:
    """Yield which experts each request chose in each layer, for passes in which all decode, at temperature 1."""
    model, at_once = subject.run.model, subject.context * n_requests
    engine = Engine(model, n_rows=n_requests, chunk=at_once, tokens_per_step=at_once, reuse_prompts=False)
    for seed in range(N_PASSES // 16):
        for request in subject.requests(n_requests, (17, 17), 1.0, seed):
            engine.add(request)
        engine.step()  # reads all prompts
        while not engine.is_idle:
            experts = engine.step()[0].experts
            assert experts is not None
            indices = torch.stack([layer.indices for layer in experts.chosen], 1)
            yield torch.nn.functional.one_hot(indices, model.config.n_experts).sum(2).bool()[None]


def bench_speculation(subject: Subject, say: Say) -> list[Result]:
    """Continue prompts of the last source one by one, greedily and sampling, with guesses and without, in turns."""
    drafts: dict[str, Callable[[], Draft]] = {"nothing": NoDraft}
    drafts |= {f"lookup, {k}": functools.partial(PromptLookup, k) for k in _GUESSES}
    if subject.draft is not None:
        drafts |= {f"draft, {k}": functools.partial(DraftModel, subject.draft, k, 1) for k in _GUESSES}
    results = []
    for temperature in (0.0, 0.8):
        asked = subject._replace(texts=subject.texts[-1:]).requests(N_REQUESTS // 8, (128, 128), temperature)
        found: dict[str, list[tuple[Answered, Counted]]] = {name: [] for name in ("generate", *drafts)}
        for name in [*drafts] * subject.rounds:
            counted = Counted(drafts[name]())
            found[name].append((subject.answered(asked, n_rows=1, draft=counted), counted))
            if name == "nothing":
                found["generate"].append((subject.answered_one_by_one(asked), counted))
        results += [_guessed(f"T={temperature:g}, {name}", turns, found["generate"]) for name, turns in found.items()]
    return results


def _guessed(name: str, turns: list[tuple[Answered, Counted]], plain: list[tuple[Answered, Counted]]) -> Result:
    """Return speed and counts; each request's first token needs no guess, and a pass brings one that is not guessed."""
    (answered, counted), expected = turns[0], plain[0][0].tokens
    speed, plain_speed = (statistics.median(each.speed for each, _ in some) for some in (turns, plain))
    n_decoded = answered.n_tokens - len(expected)
    return {
        "name": f"speculation/{name}",
        "tokens_per_second": speed,
        "over_generate": speed / plain_speed,
        "accepted": (n_decoded - counted.n_passes) / max(counted.n_guesses, 1),
        "tokens_per_pass": n_decoded / counted.n_passes,
        "same": answered.share_equal(expected),
    }


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the experts that a pass reads against the requests that share it, as the file's suffix says."""
    from moe_gpt.report.pictures import drawing

    mine = [result for result in results if result["name"].startswith("experts/")]
    if not mine:
        raise InputError("--plot draws experts: --only must have experts")
    sizes = [result["batch_size"] for result in mine]
    lines = {
        "uniform": ("equal loads: E (1 - (1 - K/E)^B)", "--"),
        "expected": ("the model's loads: Σ 1 - (1 - p)^B", "-"),
        "touched": ("measured", "o"),
    }
    with drawing() as (figure, axes):
        for key, (label, look) in lines.items():
            axes.plot(sizes, [result[key] for result in mine], look, label=label)
        axes.set_xscale("log", base=2)
        axes.set(xticks=sizes, xticklabels=sizes, xlabel="requests in a pass, B", ylabel="experts read of a layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.2)
        axes.legend(loc="lower right")
        figure.savefig(path, facecolor="white")


_SPEED = "{tokens_per_second:count}"
_COLUMNS = {
    "engine": {"": "{name}", "tokens/s": _SPEED, "32 rows are": "{first_over:.2f} x", "same answers": "{same:.0%}"},
    "server": {
        "": "{name}",
        "requests/s": "{requests_per_second:.1f}",
        "tokens/s": _SPEED,
        "of the engine": "{of_engine:.2f}",
        "first token p50, p95": "{first_token_p50_p95[0]:seconds}, {first_token_p50_p95[1]:seconds}",
        "between tokens": "{between_tokens_p50_p95[0]:seconds}, {between_tokens_p50_p95[1]:seconds}",
        "same texts": "{same:.0%}",
    },
    "experts": {"": "{name}", "read": "{touched:.2f}", "by loads": "{expected:.2f}", "by equal loads": "{uniform:.2f}"},
    "speculation": {
        "": "{name}",
        "tokens/s": _SPEED,
        "of generate": "{over_generate:.2f} x",
        "accepted": "{accepted:.2f}",
        "tokens a pass": "{tokens_per_pass:.2f}",
        "same answers": "{same:.0%}",
    },
}
PARTS = dict(engine=bench_engine, server=bench_server, experts=bench_experts, speculation=bench_speculation)
