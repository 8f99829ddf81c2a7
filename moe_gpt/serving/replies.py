"""Answers in OpenAI's shapes: whole, and as the chunks of a stream."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.inference.request import Event, TokenExperts, TokenScore
from moe_gpt.serving.protocol import AnyBody, ChatBody


@dataclasses.dataclass
class Choice:
    """One answer while it grows."""

    text: str = ""
    keeps_experts: bool = False
    """Whether somebody asks for them: what knows them keeps those of all tokens of a pass."""
    n_tokens: int = 0
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    experts: list[tuple[str, TokenExperts]] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def grow(self, event: Event) -> None:
        """Take in an event."""
        self.text += event.text
        self.scores += [*(event.prompt_scores or []), *filter(None, [event.score])]
        self.finish = event.finish
        if event.token is not None:
            self.n_tokens += 1
            if event.experts is not None and self.keeps_experts:
                self.experts.append((event.text, event.experts))

    def is_worth_sending(self, replies: Replies) -> bool:
        """Whether a stream needs a chunk for this part: it brings something that the client asked for."""
        return bool(self.text or self.finish or (self.n_tokens and replies.shows_tokens))


def _told(text: str, token: TokenExperts) -> dict[str, Any]:
    """Return a token's experts in each layer, with weights."""
    weights = [[round(weight, 3) for weight in layer] for layer in token.weights()]
    return {"text": text, "experts": token.indices(), "weights": weights}


class Replies:
    """Makes the objects of one answer.

    Args:
        body: what was asked.
        model: the name that the client gets.
        tokenizer: spells tokens.
    """

    def __init__(self, body: AnyBody, model: str, tokenizer: Tokenizer) -> None:
        self.is_chat, self._tokenizer, self._reports_usage = isinstance(body, ChatBody), tokenizer, body.reports_usage
        self._shows_experts, self._shows_scores = bool(body.return_experts), body.n_logprobs is not None
        self.shows_tokens = self._shows_experts or self._shows_scores
        """Whether tokens count that bring no text yet."""
        kind = "chatcmpl" if self.is_chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], n_prompt: int) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        bodies = [self._choice(index, choice, choice.text, is_delta=False) for index, choice in enumerate(choices)]
        return self._head | {"object": kind, "choices": bodies, "usage": usage(choices, n_prompt)}

    def chunk(self, index: int, part: Choice) -> dict[str, Any]:
        """Return the part of a stream that brings some text of a choice, or its end."""
        return self._chunk([self._choice(index, part, part.text, is_delta=True)])

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first part of a choice of a chat."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def last(self, choices: Sequence[Choice], n_prompt: int) -> dict[str, Any]:
        """Return the part of a stream that counts tokens."""
        return self._chunk([]) | {"usage": usage(choices, n_prompt)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._head | {"object": kind, "choices": choices} | ({"usage": None} if self._reports_usage else {})

    def _choice(self, index: int, choice: Choice, text: str, is_delta: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": choice.finish}
        body |= self._message(text, is_delta, bool(choice.finish)) if self.is_chat else {"text": text}
        if self._shows_scores:
            body["logprobs"] = self._chat_scores(choice) if self.is_chat else self._completion_scores(choice)
        return body | ({"experts": [_told(*each) for each in choice.experts]} if self._shows_experts else {})

    @staticmethod
    def _message(text: str, is_delta: bool, is_end: bool) -> dict[str, Any]:
        if not is_delta:
            return {"message": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text or not is_end else {}}

    def _chat_scores(self, choice: Choice) -> dict[str, Any]:
        return {
            "content": [
                self._scored(score.token, score.logprob)
                | {"top_logprobs": [self._scored(token, logprob) for token, logprob in score.top]}
                for score in choice.scores
            ]
        }

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        is_whole = "\ufffd" not in text  # else some bytes of a character, which text cannot show
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}

    def _completion_scores(self, choice: Choice) -> dict[str, Any]:
        texts = [self._tokenizer.decode([score.token]) for score in choice.scores]
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for score in choice.scores],
            "top_logprobs": [self._top(score) for score in choice.scores],
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }

    def _top(self, score: TokenScore) -> dict[str, float] | None:
        """Return the most likely tokens; of those that are spelled alike, the more likely."""
        return {self._tokenizer.decode([token]): logprob for token, logprob in reversed(score.top)} or None


def usage(choices: Sequence[Choice], n_prompt: int) -> dict[str, int]:
    """Return the counts of tokens; a prompt counts once for all its choices."""
    n_completion = sum(choice.n_tokens for choice in choices)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}
