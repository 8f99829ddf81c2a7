"""How much a search helps: the first sentence of a docstring, said with and without the passage that is found.

The questions are on functions of held-out modules of Python's library. The search is in the docstrings of all modules.
"""

from __future__ import annotations

import ast
import collections
import itertools
import random
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from moe_gpt.data.builtin_corpus import documented_nodes, parsed_modules
from moe_gpt.data.document import Document, is_held_out
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision
from moe_gpt.post_training.chat import CALL_START, TURN_END, Message, mark, plain_text, render
from moe_gpt.post_training.scores import MOST_TOKENS, Score, greedy_answers, mean, share
from moe_gpt.post_training.tools import NOTHING, PASSAGE, make_index, words

_N_QUESTIONS, _MOST_FOUND = 256, 5


class Documented(NamedTuple):
    """A function with a docstring, and what is asked about it."""

    name: str
    """Dotted, with its module, so that no other function has the same question."""
    docstring: str
    """Without indentation."""

    @property
    def question(self) -> str:
        """What a user asks."""
        return f"What does {self.name} do?"

    @property
    def sentence(self) -> str:
        """The right answer: the docstring up to its first end of a sentence or paragraph."""
        return " ".join(re.split(r"(?<=[.!?])\s|\n\s*\n", self.docstring, maxsplit=1)[0].split())

    @property
    def passage(self) -> str:
        """What a search finds."""
        return f"{self.name}: {' '.join(self.docstring.split())}"[:PASSAGE]


class Asked(NamedTuple):
    """A question with what a search finds."""

    right_sentence: str
    found: list[str]
    """The sentences of the passages, the best one first."""
    prompts: list[list[int]]
    """Tokens of the question alone, and of the question with a call of the search and its first passage."""


def documented_functions(validation_fraction: float) -> tuple[list[Documented], list[Documented]]:
    """Return the functions of training's modules, and those of held-out ones in a fixed random order.

    Each is there once. A held-out one whose sentence has the words of one in training is in neither list.
    """
    training, held_out = sides = dict[Documented, None](), dict[Documented, None]()
    for module, _, tree in parsed_modules():
        sides[is_held_out(Document("", module), validation_fraction)].update(dict.fromkeys(_functions(module, tree)))
    known = {tuple(words(function.sentence)) for function in training}
    new = [function for function in held_out if tuple(words(function.sentence)) not in known]
    random.Random("retrieval").shuffle(new)
    return list(training), new


def _functions(module: str, tree: ast.Module) -> list[Documented]:
    nodes = [(node, name) for node, name in documented_nodes(tree) if isinstance(node, ast.FunctionDef)]
    found = [Documented(module + name, (ast.get_docstring(node) or "").strip()) for node, name in nodes]
    return [function for function in found if function.docstring]


def score_retrieval(
    model: MoEGPT, tokenizer: Tokenizer, validation_fraction: float, precision: Precision = "fp32"
) -> dict[str, Score]:
    """Return how often a search finds the right passage, and how good a model's greedy answers are with and without it.

    ``found_first`` and ``found_in_5`` are the shares of questions for which a passage with the right sentence is the
    first one, or among five. ``exact`` is the share of answers with exactly the words of the right sentence, and ``f1``
    the mean F1 of words (SQuAD, arXiv 1606.05250, section 6.1). ``_with_search`` stands for the same after a call of
    the tool, whose result is the first passage. A call is no answer: what is said before it counts. Questions that
    leave no room for an answer in the context are left out.

    Raises:
        InputError: where bm25s is not installed, or no question is left.
    """
    engine = Engine(model, precision=precision, max_waiting=2 * _N_QUESTIONS, is_exact=False)
    asked = _ask(*documented_functions(validation_fraction), tokenizer, engine.context - MOST_TOKENS)
    if not asked:
        raise InputError(
            f"the model's context must hold a question, a passage and {MOST_TOKENS} tokens of an answer, got "
            f"{engine.context} tokens; use a model with a longer context"
        )
    right = [question.right_sentence for question in asked]
    scores = {
        "found_first": share([question.right_sentence in question.found[:1] for question in asked]),
        "found_in_5": share([question.right_sentence in question.found for question in asked]),
    }
    for place, name in enumerate(("", "_with_search")):
        with evaluating(model):
            prompts = [question.prompts[place] for question in asked]
            answers = greedy_answers(engine, prompts, [mark(TURN_END, tokenizer)], MOST_TOKENS)
        said = [_said(answer.ids, tokenizer) for answer in answers]
        exact = share([words(a) == words(b) for a, b in zip(said, right, strict=True)])
        scores |= {f"exact{name}": exact, f"f1{name}": mean([f1(a, b) for a, b in zip(said, right, strict=True)])}
    return scores


def _said(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of an answer up to its first call of a tool."""
    call = mark(CALL_START, tokenizer)
    return plain_text([*itertools.takewhile(lambda token: token != call, ids)], tokenizer)


def _ask(
    training: Sequence[Documented], held_out: Sequence[Documented], tokenizer: Tokenizer, longest: int
) -> list[Asked]:
    """Return the questions whose prompts are short enough."""
    everything, asked = [*training, *held_out], list[Asked]()
    find = make_index([function.passage for function in everything])
    for function in held_out[:_N_QUESTIONS]:
        found = [everything[place] for place in find(function.question, _MOST_FOUND)]
        both = without_and_with_search(function.question, found[0].passage if found else NOTHING)
        prompts = [render(turns, tokenizer, add_generation_prompt=True).ids for turns in both]
        asked.append(Asked(function.sentence, [passage.sentence for passage in found], prompts))
    return [question for question in asked if len(question.prompts[1]) <= longest]


def without_and_with_search(question: str, passage: str) -> tuple[list[Message], list[Message]]:
    """Return a question alone, and with a search."""
    asked: list[Message] = [{"role": "user", "content": question}]
    call = {"function": {"name": "search", "arguments": {"query": question}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    return asked, [*asked, called, {"role": "tool", "content": passage}]


def f1(answer: str, right: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's words."""
    said, wanted = (collections.Counter(words(text)) for text in (answer, right))
    n_shared = (said & wanted).total()
    return statistics.harmonic_mean([n_shared / said.total(), n_shared / wanted.total()]) if n_shared else 0.0
