"""Scores of a model that chats: greedy answers to held-out questions of the built-in sets, exactly right or not."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.config import ConversationSourceConfig
from moe_gpt.config.vision import BASELINES
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.files.durable import replace_file
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.request import Request
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision
from moe_gpt.post_training.builtin_sets import builtin_conversations
from moe_gpt.post_training.chat import TURN_END, Message, mark, read_calls, render
from moe_gpt.post_training.starting import held_out_fraction, present
from moe_gpt.post_training.tools import calculate
from moe_gpt.terminal.tables import format_table
from moe_gpt.training.setup import Run

_N_QUESTIONS = 256
MOST_TOKENS, _ROOM = 64, 96
"""Tokens of an answer, and how much longer than the right ones a model's answers and their results may be."""


class Score(NamedTuple):
    """A share of right answers."""

    score: float
    n: int
    standard_error: float


class Answer(NamedTuple):
    """What a model says to a prompt."""

    prompt: list[int]
    ids: list[int]
    """Without the end of the turn."""
    has_ended: bool


def mean(values: Sequence[float]) -> Score:
    """Return the mean of some numbers, with its standard error; of one number it is 0."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Score(statistics.fmean(values), len(values), error)


def share(right: Sequence[bool]) -> Score:
    """Return the share of what is right, with the standard error of a share of so many."""
    p = sum(right) / len(right)
    return Score(p, len(right), math.sqrt(p * (1 - p) / len(right)))


class Examiner:
    """Asks a model, and counts what is right.

    Args:
        validation_fraction: share of the modules that the built-in sets hold out.
    """

    def __init__(
        self, model: MoEGPT, tokenizer: Tokenizer, validation_fraction: float, precision: Precision = "fp32"
    ) -> None:
        self._tokenizer, self._fraction, self._end = tokenizer, validation_fraction, mark(TURN_END, tokenizer)
        self._engine = Engine(model, precision=precision, max_waiting=2 * _N_QUESTIONS, is_exact=False)

    def examine(self, kinds: Iterable[str]) -> dict[str, Score]:
        """Return the score of each task of some built-in sets; ``stops`` is about first answers to all of them."""
        first: list[Answer] = []
        scores: dict[str, Score] = {}
        for kind in dict.fromkeys(kinds):
            conversations = self._held_out(kind)
            if not conversations:  # the context is too short
                continue
            answers = self._answer([render(c[:1], self._tokenizer, True).ids for c in conversations])
            first += answers
            scores |= _TASKS[kind](self, conversations, answers)
        stops = {"stops": share([answer.has_ended for answer in first])} if first else {}
        return stops | scores

    def answers(self, kinds: Sequence[str], n: int) -> list[dict[str, Any]]:
        """Return at most ``n`` turns of some built-in sets, with the right answer and the model's, as texts."""
        found = list[dict[str, Any]]()
        for kind in kinds:
            conversations = self._held_out(kind)[: n // (2 * len(kinds))]
            first = self._answer([render(c[:1], self._tokenizer, True).ids for c in conversations])
            second = self._reply(first, self._next_turns(conversations, first))
            for conversation, *both in zip(conversations, first, second, strict=True):
                told = (conversation[:2], conversation[2:])
                found += [self._turn(kind, turn, *pair) for turn, pair in enumerate(zip(told, both, strict=True), 1)]
        return found

    def _turn(self, kind: str, number: int, told: Sequence[Message], answer: Answer) -> dict[str, Any]:
        asked, right = told
        ids, is_answer = render([right], self._tokenizer)
        prompt = asked["content"] if asked["role"] == "user" else "(the result of its own call)"
        texts = {"prompt": prompt, "expected": self._tokenizer.decode([*itertools.compress(ids, is_answer)][:-1])}
        return {"task": kind, "turn": number, **texts, "answer": self._tokenizer.decode(answer.ids)}

    def use_of_calculator(self, conversations: list[list[Message]], answers: list[Answer]) -> dict[str, Score]:
        """Return how often the call is right, and how often the answer after the model's own call."""
        calls = [read_calls(answer.ids, self._tokenizer) for answer in answers]
        wanted_calls = [conversation[1]["tool_calls"] for conversation in conversations]
        is_call = [a.has_ended and b == c for a, b, c in zip(answers, calls, wanted_calls, strict=True)]
        turns = self._next_turns(conversations, answers)
        replies, results = self._reply(answers, turns), [turn["content"] for turn in turns]
        wanted = [conversation[2]["content"] for conversation in conversations]
        said = [re.findall(r"-?\d+", self._tokenizer.decode(reply.ids))[-1:] for reply in replies]
        is_right = [a == [b] and b == c for a, b, c in zip(said, wanted, results, strict=True)]
        return {"tool_call": share(is_call), "own_answer": share(is_right)}

    def understanding_of_functions(self, conversations: list[list[Message]], answers: list[Answer]) -> dict[str, Score]:
        """Return how often the parameters are right, and how often the name in the turn after the model's answer."""
        replies = self._reply(answers, self._next_turns(conversations, answers))
        texts = [[self._tokenizer.decode(answer.ids) for answer in part] for part in (answers, replies)]
        wanted = [[conversation[turn]["content"] for conversation in conversations] for turn in (1, 3)]
        right = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(texts, wanted, strict=True)]
        return {"parameters": share(right[0]), "second_turn_name": share(right[1])}

    def _held_out(self, kind: str) -> list[list[Message]]:
        """Return conversations with room for the prompt and two answers."""
        found = builtin_conversations(kind, True, self._fraction)
        room = self._engine.context - _ROOM
        return [c for c in found if len(render(c, self._tokenizer).ids) < room][:_N_QUESTIONS]

    def _next_turns(self, conversations: list[list[Message]], answers: list[Answer]) -> list[Message]:
        """Return what follows the model's first answers: the user's turn, or the result of the model's own call."""
        return [self._next_turn(*pair) for pair in zip(conversations, answers, strict=True)]

    def _next_turn(self, conversation: list[Message], answer: Answer) -> Message:
        if conversation[2]["role"] == "user":
            return conversation[2]
        return {"role": "tool", "content": calculate(_expression(read_calls(answer.ids, self._tokenizer)))}

    def _reply(self, answers: Sequence[Answer], turns: Sequence[Message]) -> list[Answer]:
        """Return the answers in the next turn."""
        line_end = self._tokenizer.encode("\n")
        return self._answer(
            [
                [*answer.prompt, *answer.ids, self._end, *line_end, *render([turn], self._tokenizer, True).ids]
                for answer, turn in zip(answers, turns, strict=True)
            ]
        )

    def _answer(self, prompts: Sequence[list[int]]) -> list[Answer]:
        return greedy_answers(self._engine, prompts, [self._end], MOST_TOKENS)


def greedy_answers(
    engine: Engine, prompts: Sequence[list[int]], ends: Collection[int], max_new_tokens: int
) -> list[Answer]:
    """Return the most likely answer to each prompt; tokens that end an answer are left out."""
    answers = {}
    for prompt in prompts:
        request = Request(
            prompt=prompt, max_new_tokens=max_new_tokens, sampling=SamplingConfig(temperature=0), ends=tuple(ends)
        )
        answers[engine.add(request)] = Answer(prompt, [], False)
    for event in engine.run():
        answer = answers[event.request_id]
        if event.token is not None and event.token not in ends:
            answer.ids.append(event.token)
        answers[event.request_id] = answer._replace(has_ended=event.finish == "stop")
    return list(answers.values())


_TASKS = {"calculator": Examiner.use_of_calculator, "functions": Examiner.understanding_of_functions}


def _expression(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return what the calculator is asked for; empty where it is not asked."""
    function = calls[0]["function"] if len(calls) == 1 else {"name": None, "arguments": {}}
    given = function["arguments"].get("expression")
    return given if function["name"] == "calculator" and isinstance(given, str) else ""


def score_conversations(run: Run, model: MoEGPT) -> dict[str, Score]:
    """Return the scores of the built-in sets that a run learns from."""
    with evaluating(model):
        return _examiner(run, model).examine(_kinds(run))


def conversation_answers(run: Run, model: MoEGPT, n: int) -> list[dict[str, Any]]:
    """Return at most ``n`` turns of the run's built-in sets, with the right answers and the model's."""
    with evaluating(model):
        return _examiner(run, model).answers(_kinds(run), n)


def conversation_rows(run: Run, n: int) -> list[list[int]]:
    """Return the tokens of held-out conversations that fit a row, of all built-in sets ``n``, with right answers."""
    kinds, fraction, tokenizer = _kinds(run), held_out_fraction(run.config.data), run.data.tokenizer
    sets = [builtin_conversations(kind, True, fraction)[:_N_QUESTIONS] for kind in kinds]
    rows = [render(conversation, tokenizer).ids for conversation in itertools.chain(*zip(*sets, strict=False))]
    return [row for row in rows if len(row) <= run.config.model.max_seq_len][:n]


def _examiner(run: Run, model: MoEGPT) -> Examiner:
    return Examiner(model, run.data.tokenizer, held_out_fraction(run.config.data), run.precision)


def _kinds(run: Run) -> list[str]:
    """Return the built-in sets that a run learns from."""
    return list(dict.fromkeys(source.builtin for source in present(run.config.sft).sources if source.builtin))


def what_is_not_scored(sources: Iterable[ConversationSourceConfig], found: Collection[str]) -> str:
    """Return which sources' conversations have no score among those found, and why; empty where all have one."""
    missing = {source.name: source.builtin for source in sources if _FIRST_TASKS.get(source.builtin) not in found}
    return "; ".join(f"note: no scores for {name}, because {_WHY_NOT[kind is None]}" for name, kind in missing.items())


_FIRST_TASKS: dict[str | None, str] = {"calculator": "tool_call", "functions": "parameters"}
_WHY_NOT = {
    True: "only the built-in sets have questions with known answers",
    False: "the context has no room for its questions and two answers",
}


def write_scores(run_dir: Path, stage: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """Add scores to a run's ``scores.json``, such as ``before`` or ``after``; return all of them."""
    path = run_dir / "scores.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    values = {"stage": stage, **values, **_plain(found)}
    replace_file(path, json.dumps(values, indent=2) + "\n")
    return values


def _plain(found: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(found, Mapping):
        return {name: _plain(part) for name, part in found.items()}
    return found._asdict() if hasattr(found, "_asdict") else found


def format_scores(values: Mapping[str, Any]) -> str:
    """Return the scores before and after a stage as a table for people."""
    before, after = values.get("before", {}), values.get("after", {})
    if values.get("stage") == "see":
        return _format_seen(after)
    rows = [(task, str(after[task]["n"]), *(_shown(task, part) for part in (before, after))) for task in after]
    return format_table(("task", "n", "before", "after"), rows)


def _format_seen(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return the scores of a model that sees beside what is right without seeing."""
    rows = list[tuple[str, ...]]()
    for task, score in ((task, score) for task, score in scores.items() if score["n"]):
        shares = ["-" if score[name] is None else f"{score[name]:.1%}" for name in BASELINES]
        rows.append((task, str(score["n"]), _shown(task, scores), *shares))
    return format_table(("task", "n", "score", *(name.replace("_", " ") for name in BASELINES)), rows)


def _shown(task: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return a share in percent, and a KL in nats."""
    if task not in scores:
        return "-"
    score, form = scores[task], ".2f" if task == "kl" else ".1%"
    return f"{score['score']:{form}} ± {score['standard_error']:{form}}"
