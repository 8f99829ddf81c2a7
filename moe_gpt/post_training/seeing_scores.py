"""Scores of a model that sees: answers to questions on pictures, exactly right or not, beside those without them."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.model.cache import KVCache
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast
from moe_gpt.post_training.chat import plain_text
from moe_gpt.post_training.pictured import row_of
from moe_gpt.post_training.rollout import left_padded
from moe_gpt.post_training.scores import share
from moe_gpt.post_training.showing import PicturedRows, seen_by
from moe_gpt.post_training.starting import present
from moe_gpt.vision.examples import test_examples, training_example
from moe_gpt.vision.pictured_text import MARKER, Row
from moe_gpt.vision.seeing import SeeingModel

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

_AT_ONCE, _MORE = 100, 4
"""Rows that are answered together, and tokens that an answer may be longer than the right one."""
_N_COUNTED, _N_HELD_OUT = 4000, 256
"""Training examples whose answers are counted, and held-out rows of files that are answered."""


class PictureScore(NamedTuple):
    """A share of right answers, beside what is right without seeing."""

    score: float
    n: int
    standard_error: float
    shuffled: float | None
    """Share that is right where each question has the pictures of another one; None where there is one question."""
    blind: float
    """Share that is right with the usual answer to the same question in training: no model does better blind."""
    random_object: float | None
    """Share that is right about a random object of the right picture; None where the question is of no object."""


class _Question(NamedTuple):
    row: Row
    by_chance: float | None = None


def score_pictures(run: Run, model: MoEGPT) -> dict[str, PictureScore]:
    """Return the score of each task of the built-in sources, and of the held-out rows of files.

    There are none for a model with closed gates, which sees nothing: it is the text model.
    """
    if not _is_open(model):
        return {}
    tasks, known = _questions(run)
    with evaluating(model):
        return {task: _score(run, model, questions, known) for task, questions in tasks.items()}


def _is_open(model: MoEGPT) -> bool:
    return any(bool(gate.any()) for name, gate in model.named_parameters() if name.endswith("_gate"))


def _questions(run: Run) -> tuple[dict[str, list[_Question]], list[Row]]:
    """Return the questions of each task, and rows of training from which the usual answers are taken."""
    material, tokenizer = _material(run), run.data.tokenizer
    tasks, known = dict[str, list[_Question]](), [item for item in material.items if isinstance(item, Row)]
    for source in {source.builtin: None for source in present(run.config.see).sources if source.builtin}:
        for task, examples in test_examples(source).items():
            tasks[task] = [_Question(row_of(each, tokenizer), each.by_chance) for each in examples]
        known += [row_of(training_example(source, number), tokenizer) for number in range(_N_COUNTED)]
    if material.held_out:
        tasks["held_out_rows"] = [_Question(row) for row in material.held_out[:_N_HELD_OUT]]
    return tasks, known


def _score(run: Run, model: Any, questions: Sequence[_Question], known: Sequence[Row]) -> PictureScore:
    rows, usual = [question.row for question in questions], _usual_answers(known)
    right, shuffled = list[bool](), list[bool]()
    for part in _parts(rows):
        wanted = [expected(row, run.data.tokenizer) for row in part]
        for shift, found in ((0, right), (1, shuffled)):
            if shift < len(part):
                answers = answer(model, part, run.data.tokenizer, run.precision, shift)
                found += [a == b for a, b in zip(answers, wanted, strict=True)]
    blind = [usual.get(_question(row)) == tuple(row.text.ids[row.start :]) for row in rows]
    chances = [question.by_chance for question in questions if question.by_chance is not None]
    others = (
        share(shuffled).score if shuffled else None,
        share(blind).score,
        statistics.fmean(chances) if chances else None,
    )
    return PictureScore(*share(right), *others)


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield rows that have equally many pictures, so that these can change places."""
    ordered = sorted(rows, key=lambda row: len(row.text.pictures))
    for _, same in itertools.groupby(ordered, key=lambda row: len(row.text.pictures)):
        part = list(same)
        yield from (part[first : first + _AT_ONCE] for first in range(0, len(part), _AT_ONCE))


def _question(row: Row) -> tuple[int, ...]:
    """Return the prompt after the last picture."""
    return tuple(row.text.ids[row.text.places[-1] : row.start])


def _usual_answers(rows: Iterable[Row]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return the most frequent answer to each question."""
    answers: defaultdict[tuple[int, ...], Counter[tuple[int, ...]]] = defaultdict(Counter)
    for row in rows:
        answers[_question(row)][tuple(row.text.ids[row.start :])] += 1
    return {question: found.most_common(1)[0][0] for question, found in answers.items()}


def picture_answers(run: Run, model: MoEGPT, n: int) -> list[dict[str, Any]]:
    """Return at most ``n`` questions of different tasks with the right answers and the model's, as texts."""
    tasks, _ = _questions(run)
    rows = [question.row for same in itertools.zip_longest(*tasks.values()) for question in same if question][:n]
    with evaluating(model):
        answers = [answer(model, [row], run.data.tokenizer, run.precision)[0] for row in rows]  # type: ignore[arg-type]
    tokenizer = run.data.tokenizer
    return [
        {"prompt": prompt_of(row, tokenizer), "expected": expected(row, tokenizer), "answer": said}
        for row, said in zip(rows, answers, strict=True)
    ]


def prompt_of(row: Row, tokenizer: Tokenizer) -> str:
    """Return the prompt as a text, with a marker for each picture."""
    ends = [*row.text.places, row.start]
    parts = [row.text.ids[: ends[0]], *(row.text.ids[a + 1 : b] for a, b in itertools.pairwise(ends))]
    return MARKER.join(plain_text(part, tokenizer) for part in parts)


def picture_rows(run: Run, n: int) -> list[list[int]]:
    """Return no rows: the experts of text alone stay what they were, and those beside pictures are not recorded."""
    return []


def _material(run: Run) -> PicturedRows:
    assert isinstance(run.material, PicturedRows), "the stage has prepared them"
    return run.material


@torch.no_grad()
def answer(
    model: SeeingModel, rows: Sequence[Row], tokenizer: Tokenizer, precision: Precision, shift: int = 0
) -> list[str]:
    """Return the most likely answers to the prompts of rows, as texts.

    Args:
        model: in evaluation mode.
        rows: with equally many pictures each, where ``shift`` is not 0.
        tokenizer: that of the model.
        precision: compute type.
        shift: by how many rows the pictures are moved on.
    """
    device, prompts = model.embedding.weight.device, [row.text.ids[: row.start] for row in rows]
    tokens, valid = (part.to(device) for part in left_padded(prompts))
    longest = max(len(row.text.ids) - row.start for row in rows) + _MORE
    cache = KVCache(model.config, len(rows), tokens.shape[1] + longest, device, model.embedding.weight.dtype)
    seen = seen_by([_moved(row, tokens.shape[1] - row.start) for row in rows], model, tokens.shape[1], shift)
    ends = torch.tensor([row.text.ids[_end(row)] for row in rows], device=device)[:, None]
    answers, is_open = tokens[:, :0], torch.ones_like(ends, dtype=torch.bool)
    while answers.shape[1] < longest and is_open.any():
        with autocast(device, precision), model.looking(seen):
            logits = model.output(model.hidden_states(tokens, valid, cache)[0][:, -1:])
        tokens = logits.argmax(-1)
        is_open = is_open & (tokens != ends)
        answers, valid = (
            torch.cat([answers, tokens.masked_fill(~is_open, -1)], dim=1),
            torch.cat([valid, is_open], dim=1),
        )
        seen = seen._replace(sees=seen.sees[:, -1:])
    return [tokenizer.decode([token for token in row if token >= 0]) for row in answers.tolist()]


def _moved(row: Row, n: int) -> Row:
    """Return a row with padding before it."""
    return row._replace(text=row.text._replace(places=[n + place for place in row.text.places]))


def _end(row: Row) -> int:
    """Return the place of the token that ends a row's last answer."""
    return len(row.text.is_answer) - 1 - row.text.is_answer[::-1].index(True)


def expected(row: Row, tokenizer: Tokenizer) -> str:
    """Return the right answer of a row."""
    return tokenizer.decode(row.text.ids[row.start : _end(row)])
