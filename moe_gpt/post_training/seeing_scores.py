"""Scores of a model that sees: answers to questions on pictures, exactly right or not, beside those without them."""

from __future__ import annotations

import itertools
import json
import math
import operator
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.files.durable import replace_file
from moe_gpt.model.cache import KVCache
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast, small_products
from moe_gpt.post_training.chat import plain_text
from moe_gpt.post_training.pictured import row_of
from moe_gpt.post_training.rollout import left_padded
from moe_gpt.post_training.scores import share
from moe_gpt.post_training.showing import PicturedRows, seen_by
from moe_gpt.post_training.starting import present
from moe_gpt.vision.cross_attention import Seen
from moe_gpt.vision.examples import TASKS, test_examples, training_example
from moe_gpt.vision.pictured_text import MARKER, Row
from moe_gpt.vision.seeing import SeeingModel

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

_AT_ONCE, _MORE = 100, 4
"""Rows that are answered together, and tokens that an answer may be longer than the right one."""
LOOKS, _N_LOOKS = "looks.safetensors", 5
"""File with where answers look, and how many answers are in it."""
_N_SCORED, _N_COUNTED = 256, 4000
"""Held-out rows of files that are answered, and training examples whose answers are counted."""


class PictureScore(NamedTuple):
    """A share of right answers, beside what is right without seeing; all None for a task that was not run."""

    score: float | None
    n: int
    standard_error: float | None
    shuffled: float | None
    """Share that is right where each question has the pictures of another one; None where there is one question."""
    blind: float | None
    """Share that is right with the usual answer to the same question in training: no model does better blind."""
    random_object: float | None
    """Share that is right about a random object of the right picture; None where the question is of no object."""


_NOT_RUN = PictureScore(None, 0, None, None, None, None)


class _Question(NamedTuple):
    row: Row
    by_chance: float | None = None


def score_pictures(run: Run, model: MoEGPT) -> dict[str, PictureScore]:
    """Return the score of each task of the built-in sources, and of the held-out rows of files.

    A run with a built-in source also has the other one's tasks, with None for each number.
    There are none for a model with closed gates, which sees nothing: it is the text model.
    """
    if not _is_open(model):
        return {}
    usual = _usual_answers(_known_rows(run))
    with evaluating(model), small_products(run.device):
        found = {task: _score(run, model, questions, usual) for task, questions in _questions(run).items()}
    return found | {task: _NOT_RUN for task in TASKS if _builtin(run) and task not in found}


def _is_open(model: MoEGPT) -> bool:
    return any(bool(gate.any()) for name, gate in model.named_parameters() if name.endswith("_gate"))


def _questions(run: Run) -> dict[str, list[_Question]]:
    """Return the questions of each task."""
    tasks = dict[str, list[_Question]]()
    for source in _builtin(run):
        for task, examples in test_examples(source).items():
            tasks[task] = [_Question(row_of(each, run.data.tokenizer), each.by_chance) for each in examples]
    if held_out := _material(run).held_out[:_N_SCORED]:
        tasks["held_out_rows"] = [_Question(row) for row in held_out]
    return tasks


def _known_rows(run: Run) -> Iterator[Row]:
    """Yield rows of training from which the usual answers are taken."""
    yield from (item for item in _material(run).items if isinstance(item, Row))
    for source in _builtin(run):
        yield from (row_of(training_example(source, number), run.data.tokenizer) for number in range(_N_COUNTED))


def _builtin(run: Run) -> list[str]:
    return list(dict.fromkeys(source.builtin for source in present(run.config.see).sources if source.builtin))


def _score(run: Run, model: Any, questions: Sequence[_Question], usual: Mapping[Any, Any]) -> PictureScore:
    rows = [question.row for question in questions]
    right, shuffled = (_right(run, model, rows, shift) for shift in (0, 1))
    blind = share([usual.get(tuple(row.question)) == tuple(row.answer) for row in rows]).score
    chances = [question.by_chance for question in questions if question.by_chance is not None]
    by_chance = statistics.fmean(chances) if chances else None
    return PictureScore(*share(right), share(shuffled).score if shuffled else None, blind, by_chance)


def _right(run: Run, model: Any, rows: Sequence[Row], shift: int) -> list[bool]:
    """Return which answers are right, where pictures are moved on by so many rows; none of rows that are alone."""
    found, tokenizer = list[bool](), run.data.tokenizer
    for part in (part for part in _parts(rows) if shift < len(part)):
        answers = answer(model, part, tokenizer, run.precision, shift)
        found += map(operator.eq, answers, [tokenizer.decode(row.answer) for row in part])
    return found


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield rows that have equally many pictures, so that these can change places."""
    ordered = sorted(rows, key=lambda row: len(row.text.pictures))
    for _, same in itertools.groupby(ordered, key=lambda row: len(row.text.pictures)):
        part = list(same)
        yield from (part[first : first + _AT_ONCE] for first in range(0, len(part), _AT_ONCE))


def _usual_answers(rows: Iterable[Row]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return the most frequent answer to each question."""
    answers: defaultdict[tuple[int, ...], Counter[tuple[int, ...]]] = defaultdict(Counter)
    for row in rows:
        answers[tuple(row.question)][tuple(row.answer)] += 1
    return {question: found.most_common(1)[0][0] for question, found in answers.items()}


def picture_answers(run: Run, model: MoEGPT, n: int) -> list[dict[str, Any]]:
    """Return at most ``n`` questions of different tasks with the right answers and the model's, as texts."""
    return [
        {
            "prompt": prompt_of(row, run.data.tokenizer),
            "expected": run.data.tokenizer.decode(row.answer),
            "answer": said,
        }
        for row, said in _answered(run, model, n)
    ]


def _answered(run: Run, model: Any, n: int) -> Iterator[tuple[Row, str]]:
    """Yield questions, each task's first one, then each task's second one and so on, with the model's answers."""
    found = itertools.chain.from_iterable(itertools.zip_longest(*_questions(run).values()))
    with evaluating(model):
        for row in [question.row for question in found if question][:n]:
            yield row, answer(model, [row], run.data.tokenizer, run.precision)[0]


def write_looks(run: Run, model: MoEGPT) -> None:
    """Write ``looks.safetensors``: pictures (3, H, W) of some questions, and where each word of an answer looks.

    The names are ``0/picture``, ``0/weights`` (words, rows, columns) and so on; the words are in the file's metadata.
    Nothing is written where rows of features have no place in a picture, as those of a resampler have not.
    """
    arrays, words, closed = dict[str, np.ndarray](), dict[str, str](), not _is_open(model)
    for number, (row, said) in enumerate(() if closed else _answered(run, model, _N_LOOKS)):
        pieces, weights = _looks(model, row, run.data.tokenizer.encode(said), run.data.tokenizer)
        if weights is None:
            return
        arrays[f"{number}/picture"] = row.text.pictures[-1].pixels(present(run.config.see).side).numpy()
        arrays[f"{number}/weights"], words[str(number)] = weights, json.dumps(pieces)
    if arrays:
        replace_file(run.run_dir / LOOKS, save(arrays, words))


def _looks(model: Any, row: Row, ids: list[int], tokenizer: Tokenizer) -> tuple[list[str], np.ndarray | None]:
    """Return the words of an answer, and how much each looks at each part of the last picture (words, side, side)."""
    whole = row._replace(text=row.text._replace(ids=row.prompt + ids))
    with evaluating(model):
        seen = seen_by([whole], model, len(whole.text.ids))
        weights = model.weights(torch.tensor([whole.text.ids], device=seen.sees.device), seen)[0]
    weights = weights[row.start - 1 : -1, (seen.picture[0] == len(row.text.pictures))].float().cpu()
    side = math.isqrt(weights.shape[1])
    weights = weights[:, weights.shape[1] - side**2 :]  # CLIP and others have a row for the whole picture first
    if side < 2 or model.settings.resampled_rows:
        return [], None
    spans = _spans_of_words([tokenizer.decode([token]) for token in ids])
    means = [weights[first:end].mean(0).reshape(side, side).numpy() for first, end in spans]
    words = [tokenizer.decode(ids[first:end]) for first, end in spans]
    return words, np.stack(means) if means else np.zeros((0, side, side), np.float32)


def _spans_of_words(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return where words begin and end, which begin with a blank."""
    starts = [at for at, text in enumerate(texts) if not at or text.startswith(" ")]
    return list(itertools.pairwise([*starts, len(texts)]))


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
    device = model.embedding.weight.device
    tokens, valid = (part.to(device) for part in left_padded([row.prompt for row in rows]))
    seen = seen_by([_moved(row, tokens.shape[1] - row.start) for row in rows], model, tokens.shape[1], shift)
    ends = torch.tensor([row.text.ids[row.end] for row in rows], device=device)[:, None]
    longest = max(len(row.answer) for row in rows) + _MORE
    found = _decode(model, tokens, valid, seen, ends, longest, precision).tolist()
    return [tokenizer.decode([token for token in row if token >= 0]) for row in found]


def _decode(
    model: SeeingModel, tokens: Tensor, valid: Tensor, seen: Seen, ends: Tensor, longest: int, precision: Precision
) -> Tensor:
    """Return the most likely answers (B, N), -1 from their ends on."""
    dtype = torch.bfloat16 if precision == "bf16" else model.embedding.weight.dtype
    cache = KVCache(model.config, len(tokens), tokens.shape[1] + longest, tokens.device, dtype)
    answers, is_open = tokens[:, :0], torch.ones_like(ends, dtype=torch.bool)
    while cache.length < cache.capacity and is_open.any():
        with autocast(tokens.device, precision), model.looking(seen):
            logits = model.output(model.hidden_states(tokens, valid, cache)[0][:, -1:])
        tokens, seen = logits.argmax(-1), seen._replace(sees=seen.sees[:, -1:])
        is_open = is_open & (tokens != ends)
        answers, valid = torch.cat([answers, tokens.masked_fill(~is_open, -1)], 1), torch.cat([valid, is_open], 1)
    return answers


def _moved(row: Row, n: int) -> Row:
    """Return a row with padding before it."""
    return row._replace(text=row.text._replace(places=[n + place for place in row.text.places]))
