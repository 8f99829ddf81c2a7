"""A conversation: turns, calls of tools, and what leaves the context."""

from __future__ import annotations

import json

import pytest

from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.inference.request import Event
from moe_gpt.post_training.chat import CALL_END, SPECIAL_TOKENS
from moe_gpt.post_training.chat import CALL_START as CALL
from moe_gpt.post_training.chat import TURN_END as END
from moe_gpt.post_training.dialogue import MOST_ROUNDS, Dialogue, read_answer
from moe_gpt.post_training.tools import CALCULATOR, Tool

TOKENIZER = train_tokenizer(["What is 12 times 7? It is 84. " * 20], 300, special_tokens=SPECIAL_TOKENS)
SPECIAL = TOKENIZER.special_tokens()


class Script:
    """An engine that says what it was told, one answer after another."""

    def __init__(self, *answers: list[int], context: int = 400) -> None:
        self.answers, self.context, self.prompts, self.cancelled = list(answers), context, [], []

    def add(self, request):
        """Note the prompt."""
        self.prompts.append(list(request.prompt))
        return len(self.prompts)

    def run(self):
        """Say the next answer."""
        yield Event(len(self.prompts) - 1, finish="cancelled")  # of an earlier answer
        for token in self.answers.pop(0):
            yield Event(len(self.prompts), token)
        yield Event(len(self.prompts), finish="stop")

    def cancel(self, number):
        """Note it."""
        self.cancelled.append(number)


def encode(messages):
    """Return one token for each character, and the role's first one."""
    return [token for m in messages for token in TOKENIZER.encode(m["role"][0] + m["content"])]


def call(name: str, **arguments: object) -> list[int]:
    """Return the tokens of a call."""
    text = json.dumps({"name": name, "arguments": arguments})
    return [SPECIAL[CALL], *TOKENIZER.encode(text), SPECIAL[CALL_END]]


def make(engine: Script, **more: object) -> Dialogue:
    """Return a dialogue with an engine that has a script."""
    return Dialogue(engine=engine, tokenizer=TOKENIZER, encode=encode, ends=[SPECIAL[END]], max_new_tokens=40, **more)


def ask(text: str) -> list[dict]:
    """Return a conversation that begins."""
    return [{"role": "user", "content": text}]


def test_an_answer_is_text_without_special_tokens():
    """Piece by piece, and as a turn."""
    engine, messages = Script(TOKENIZER.encode("It is größer.")), ask("What?")
    pieces = list(make(engine).reply(messages))
    assert "".join(piece.text for piece in pieces) == "It is größer."
    assert messages[1:] == [{"role": "assistant", "content": "It is größer."}]
    assert engine.cancelled == [1]


def test_a_call_is_run_and_its_result_is_read():
    """The result is a turn of its own, and the next answer sees it."""
    engine, messages = Script(call("calculator", expression="12*7"), TOKENIZER.encode("It is 84.")), ask("12 times 7?")
    pieces = list(make(engine, tools={"calculator": CALCULATOR}).reply(messages))
    assert [piece.text for piece in pieces if piece.is_result] == ["84"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "calculator", "arguments": {"expression": "12*7"}}
    assert engine.prompts[1] == encode(messages[:3])


def test_without_tools_a_call_is_the_answer():
    """As text, without the marks."""
    engine, messages = Script(call("calculator", expression="1+1")), ask("1+1?")
    text = "".join(piece.text for piece in make(engine).reply(messages))
    assert json.loads(text) == {"name": "calculator", "arguments": {"expression": "1+1"}}
    assert len(messages) == 2


def test_a_model_that_goes_on_calling_is_stopped():
    """After three rounds."""
    engine = Script(*[call("calculator", expression="1")] * 9)
    messages = ask("?")
    list(make(engine, tools={"calculator": CALCULATOR}).reply(messages))
    assert sum(message["role"] == "tool" for message in messages) == MOST_ROUNDS == 3
    assert messages[-1]["tool_calls"]


@pytest.mark.parametrize(
    "ids",
    [
        [SPECIAL[CALL]],
        [SPECIAL[CALL_END], SPECIAL[CALL]],
        [SPECIAL[CALL], *TOKENIZER.encode("12*7"), SPECIAL[CALL_END]],
        [SPECIAL[CALL], *TOKENIZER.encode('{"name": "calculator"}'), SPECIAL[CALL_END]],
        [SPECIAL[CALL], *TOKENIZER.encode('{"name": 7, "arguments": {}}'), SPECIAL[CALL_END]],
        [SPECIAL[CALL], *TOKENIZER.encode("[" * 50_000), SPECIAL[CALL_END]],
        TOKENIZER.encode(f'{CALL}{{"name": "calculator", "arguments": {{}}}}{CALL_END}'),
    ],
)
def test_a_call_that_is_not_well_formed_is_text(ids):
    """So is one whose marks are only spelled."""
    answer = read_answer(ids, TOKENIZER)
    assert answer["role"] == "assistant"
    assert "tool_calls" not in answer


def test_the_oldest_questions_leave_a_full_context():
    """Whole turns go, each with its answer; the system's message stays."""
    turns = [
        {"role": "system", "content": "Be brief."},
        *[{"role": role, "content": f"{role} {i}"} for i in range(9) for role in ("user", "assistant")],
        {"role": "user", "content": "last"},
    ]
    room = 60
    kept, n_left_out = make(Script(context=room + 20)).fitting(turns)
    assert kept[0] == turns[0]
    assert kept[1]["role"] == "user"
    assert kept == [turns[0], *turns[1 + n_left_out :]]
    assert len(encode(kept)) <= room
    assert len(encode([turns[0], *turns[n_left_out - 1 :]])) > room
    assert make(Script()).fitting(turns[:3]) == (turns[:3], 0)


def test_what_leaves_the_context_between_rounds_is_said():
    """A long result of a tool is room that an old question has no more; the notice comes before the answer to it."""
    long = Tool("long", "query", lambda query: "z" * 100)
    engine = Script(call("long", query="x"), TOKENIZER.encode("It is 84."), context=160)
    messages = [*ask("What? " * 5), {"role": "assistant", "content": "It."}, *ask("What is it?")]
    pieces = list(make(engine, tools={"long": long}).reply(messages))
    place = next(place for place, piece in enumerate(pieces) if piece.notice)
    assert pieces[place].notice == "the context is full; the oldest 2 of 5 messages are left out"
    assert pieces[place - 1].is_result
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert engine.prompts[1] == encode(messages[:3])


def test_a_question_that_does_not_fit_is_an_error():
    """With the sizes."""
    with pytest.raises(InputError, match=r"at most 60 tokens.*got \d+: the context has 80"):
        make(Script(context=80)).fitting(ask("x" * 100))


def test_a_failing_model_is_an_error():
    """It is not an empty answer."""
    engine = Script([])
    engine.run = lambda: iter([Event(1, finish="error", error="damaged")])
    with pytest.raises(InputError, match="damaged"):
        list(make(engine).reply(ask("?")))
