"""A conversation with a model: it answers, calls tools and reads their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_gpt.data.tokenizer import TextDecoder, Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.request import Beside, Event, Request, TokenExperts
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.post_training.chat import CALL_START, Message, mark, read_calls
from moe_gpt.post_training.tools import Call, Tool, run_tool

MOST_ROUNDS = 3
"""Calls of tools between a question and its answer."""


class Piece(NamedTuple):
    """A part of an answer, or the whole result of a tool."""

    text: str
    experts: TokenExperts | None = None
    """Those that chose the token; None of a tool's result."""
    is_result: bool = False
    notice: str = ""
    """What the user has to know before the model goes on; the text is then empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogue:
    """What it takes to answer messages."""

    engine: Engine
    tokenizer: Tokenizer
    encode: Callable[[Sequence[Message]], list[int]]
    """Turns messages into tokens, the beginning of the answer included."""
    ends: Collection[int]
    """Tokens that end an answer."""
    beside: Callable[[Sequence[Message]], Beside | None] = lambda _: None
    """Returns what the tokens of messages read beside the text, such as pictures."""
    tools: Mapping[str, Tool] = dataclasses.field(default_factory=dict)
    max_new_tokens: int = 200
    sampling: SamplingConfig = SamplingConfig(temperature=0)
    seed: int = 0

    def reply(self, messages: list[Message]) -> Iterator[Piece]:
        """Yield the answer to the last message as it is made, and append its turns to the messages.

        Messages that do not fit into the context are taken out, and a piece says so.
        A call of a tool is a turn, and its result is one. After ``MOST_ROUNDS`` of them, a call is the answer.

        Raises:
            InputError: where the last question does not fit into the context.
        """
        for n_rounds in range(MOST_ROUNDS + 1):
            yield from self._answer(messages)
            calls = calls_of(messages[-1]) if self.tools and n_rounds < MOST_ROUNDS else []
            yield from (self._run(call, messages) for call in calls)
            if not calls:
                return

    def _answer(self, messages: list[Message]) -> Iterator[Piece]:
        kept, n_left_out = self.fitting(messages)
        if n_left_out:
            text = f"the context is full; the oldest {n_left_out} of {len(messages)} messages are left out"
            yield Piece("", notice=text)
        messages[:] = kept
        new: list[int] = []
        for event in self._events(messages):
            if event.token is not None:
                new.append(event.token)
            yield Piece(event.text, event.experts)
        messages.append(read_answer([token for token in new if token not in self.ends], self.tokenizer))

    def _run(self, call: Call, messages: list[Message]) -> Piece:
        result = run_tool(self.tools, call)
        messages.append({"role": "tool", "content": result})
        return Piece(result, is_result=True)

    @property
    def _room(self) -> int:
        """Tokens that the messages may have."""
        return self.engine.context - min(self.max_new_tokens, self.engine.context // 4)

    def fitting(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """Return the messages that fit into the context, and how many were left out.

        The oldest questions go first, each with all that answers it. A quarter of the context, or ``max_new_tokens``,
        stays free for the answer.

        Raises:
            InputError: where the last question alone does not fit.
        """
        n_system = int(bool(messages) and messages[0]["role"] == "system")
        for place in _beginnings(messages, n_system):
            kept = [*messages[:n_system], *messages[place:]]
            if (n_tokens := len(self.encode(kept))) <= self._room:
                return kept, len(messages) - len(kept)
        raise InputError(
            f"the last question must have at most {self._room} tokens, with the system's message and all that was "
            f"answered since, got {n_tokens}: the context has {self.engine.context}, and the rest is for the answer"
        )

    def _events(self, messages: Sequence[Message]) -> Iterator[Event]:
        """Yield what the engine does for an answer, with text that has no special tokens."""
        prompt = self.encode(messages)
        room = self.engine.context - len(prompt)
        request = Request(
            prompt=prompt,
            max_new_tokens=min(self.max_new_tokens, room),
            sampling=self.sampling,
            seed=self.seed,
            ends=self.ends,
            beside=self.beside(messages),
        )
        number = self.engine.add(request)
        decoder, special = TextDecoder(self.tokenizer, prompt), set(self.tokenizer.special_tokens().values())
        try:
            for event in self.engine.run():
                if event.request_id != number:  # the end of an answer that nobody read to its end
                    continue
                if event.finish == "error":
                    raise InputError(event.error)
                text = "" if event.token is None or event.token in special else decoder.push(event.token)
                yield event._replace(text=text + (decoder.finish() if event.finish else ""))
        finally:
            self.engine.cancel(number)


def _beginnings(messages: Sequence[Message], n_system: int) -> list[int]:
    """Return where a conversation may begin after the system's message: at its first turn, or at a later question."""
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return [n_system, *asked[1:]]


def read_answer(ids: Sequence[int], tokenizer: Tokenizer) -> Message:
    """Return an assistant's tokens as a message; a call that is not well formed is text."""
    special = set(tokenizer.special_tokens().values())
    calls = read_calls(ids, tokenizer)
    said = list(ids)[: list(ids).index(mark(CALL_START, tokenizer))] if calls else ids
    answer = {"role": "assistant", "content": tokenizer.decode([token for token in said if token not in special])}
    return {**answer, "tool_calls": calls} if calls else answer


def calls_of(message: Message) -> list[Call]:
    """Return what a message asks of tools."""
    functions = [each["function"] for each in message.get("tool_calls") or ()]
    return [Call(function["name"], function["arguments"]) for function in functions]
