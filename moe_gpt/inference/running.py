"""A request on its way: its tokens so far, its row, and its random numbers."""

from __future__ import annotations

import random

from moe_gpt.inference.request import Event, Finish, Kept, Request, TokenScore
from moe_gpt.model.transformer import MoEGPT


class Running:
    """A request that waits or has a row."""

    def __init__(self, request_id: int, request: Request, context: int) -> None:
        self.id, self.request = request_id, request
        self.tokens = list(request.prompt)
        """Prompt and answer so far."""
        self.row, self.n_cached = -1, 0
        """The row, and how many of the tokens it holds."""
        self.limit = min(len(self.tokens) + request.max_new_tokens, context)
        """Tokens of prompt and answer at most."""
        self.kept: Kept | None = None
        """What its tokens read beside the text, from its first pass on."""
        self.prompt_scores: list[TokenScore] = []
        self.rng = random.Random(request.seed)
        self._uniforms: list[float] = []

    @property
    def n_left(self) -> int:
        """Tokens that the model has not read yet."""
        return len(self.tokens) - self.n_cached

    @property
    def is_reading(self) -> bool:
        """Whether the prompt is not read to its end."""
        return self.n_cached < len(self.request.prompt)

    @property
    def scores_prompt(self) -> bool:
        """Whether the next tokens are of a prompt whose log-probabilities are wanted."""
        return self.request.scores_prompt and self.is_reading

    def keep(self, model: MoEGPT) -> None:
        """Compute what its tokens read beside the text, where there is something, and nobody has done it."""
        if self.request.beside and self.kept is None:
            self.kept = self.request.beside.keep(model)

    def uniform(self, ahead: int) -> float:
        """Return the random number of the answer's token that lies ``ahead`` of the next one; always the same."""
        if not self.request.sampling.temperature:
            return 0.0
        place = len(self.tokens) - len(self.request.prompt) + ahead
        while len(self._uniforms) <= place:
            self._uniforms.append(self.rng.random())
        return self._uniforms[place]

    def accept(self, token: int) -> tuple[str, Finish | None]:
        """Append a new token; return the text that can be shown, and why the answer ends, if it does."""
        if token in self.request.ends:
            return self.flush(), "stop"
        self.tokens.append(token)
        text, finish = self._show(token)
        return (text + self.flush() if finish else text), finish

    def flush(self) -> str:
        """Return the text that was held back."""
        return "" if self.request.text is None else self.request.text.finish()

    def _show(self, token: int) -> tuple[str, Finish | None]:
        stream = self.request.text
        text = "" if stream is None else stream.push(token)
        if stream is not None and stream.is_stopped:
            return text, "stop"
        return text, "length" if len(self.tokens) >= self.limit else None

    def end(self, finish: Finish, error: str = "") -> Event:
        """Return the event of an end that no token brings."""
        return Event(self.id, text=self.flush(), finish=finish, error=error)
