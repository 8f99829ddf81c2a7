"""How much a search helps: questions on docstrings, with and without the passage that is found."""

from __future__ import annotations

import ast

import pytest
from tiny_models import tiny_model

from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.post_training import retrieval
from moe_gpt.post_training.chat import CALL_START, SPECIAL_TOKENS, mark
from moe_gpt.post_training.retrieval import Documented, documented_functions, f1, score_retrieval
from moe_gpt.post_training.scores import Answer

MODULES = {
    "a": """
def read_line(x):
    'Read one line. Return it.'
def f():
    pass
def enqueue():
    'Add an item to the queue.'
class C:
    'No function.'
""",
    "b": """
class Queue:
    def put(self):
        '''Put an item
        into the queue

        It waits.
        '''
def read_line():
    'read one line'
""",
}


@pytest.fixture
def library(monkeypatch):
    """Two modules, of which b is held out."""
    parsed = [(name, b"", ast.parse(source)) for name, source in MODULES.items()]
    monkeypatch.setattr(retrieval, "parsed_modules", lambda: iter(parsed))
    monkeypatch.setattr(retrieval, "is_held_out", lambda document, fraction: document.split_key == "b")


def test_functions_with_docstrings_are_asked_about(library):
    """Each by its whole name; the right answer is the first sentence, or the first paragraph where it ends earlier.

    A held-out function whose answer is in training is left out.
    """
    training, held_out = documented_functions(0.5)
    assert [(function.question, function.sentence) for function in training] == [
        ("What does a.read_line do?", "Read one line."), ("What does a.enqueue do?", "Add an item to the queue."),
    ]  # fmt: skip
    assert [(function.question, function.sentence) for function in held_out] == [
        ("What does b.Queue.put do?", "Put an item into the queue")
    ]
    assert held_out[0].passage == "b.Queue.put: Put an item into the queue It waits."
    assert len(Documented("f", "x " * 999).passage) == 400


def test_f1_of_words():
    """By hand: 2 of 3 words said are right, and 2 of 4 right ones are said; a word counts as often as it stands."""
    assert f1("Put the item", "put an item back") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert f1("item item", "item") == pytest.approx(2 / 3)
    assert f1("", "item") == f1("x", "item") == 0


def test_a_short_context_is_an_error(library):
    """It holds no question with its passage."""
    tokenizer = train_tokenizer(["What does Queue put do? item\n" * 20], 300).with_special_tokens(SPECIAL_TOKENS)
    with pytest.raises(InputError, match="the model's context must hold a question"):
        score_retrieval(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, 0.5)


def test_scores_compare_answers_with_and_without_a_search(library, monkeypatch):
    """Told the answers: a call alone without, the right one after the passage, which stands in the prompt."""
    tokenizer = train_tokenizer(["What does Queue put do? item\n" * 20], 300).with_special_tokens(SPECIAL_TOKENS)
    prompts = []

    def told(engine, asked, ends, longest):
        prompts.extend(map(tokenizer.decode, asked))
        text = tokenizer.encode("put an item into the queue")
        call = mark(CALL_START, tokenizer)
        return [Answer(asked[0], [*text, call, *text] if len(prompts) > 1 else [call, *text], True)]

    monkeypatch.setattr(retrieval, "greedy_answers", told)
    found = score_retrieval(tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=512), tokenizer, 0.5)
    assert {name: score.score for name, score in found.items()} == {
        "found_first": 1, "found_in_5": 1, "exact": 0, "f1": 0, "exact_with_search": 1, "f1_with_search": 1,
    }  # fmt: skip
    assert "It waits." not in prompts[0]
    assert '{"name": "search", "arguments": {"query": "What does b.Queue.put do?"}}' in prompts[1]
    assert "<|im_start|>tool\nb.Queue.put: Put an item into the queue It waits.<|im_end|>" in prompts[1]
