"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.inference.text import TextStream
from moe_gpt.model.transformer import MoEGPT


class Span(NamedTuple):
    """New tokens of a request that has something beside its text."""

    kept: Kept
    start: int
    """Where they begin among all tokens of the pass."""
    position: int
    """Of the first of them, in its sequence."""
    n_tokens: int


class Kept(Protocol):
    """What a request keeps from its first pass to its end, such as keys and values of pictures."""

    def read_by(self, model: MoEGPT, spans: Sequence[Span]) -> AbstractContextManager[None]:
        """Let the model read, within the block, what each of the spans keeps, this one among them."""
        ...


class Beside(Protocol):
    """What a request's tokens read beside the text, such as pictures. The engine knows nothing more of it."""

    digest: str
    """Not empty; equal prompts share the keys of their tokens only where it is equal, too."""

    def check(self, model: MoEGPT, prompt: Sequence[int]) -> None:
        """Raise ``InputError`` where a model cannot read it, or it does not belong to a prompt."""
        ...

    def keep(self, model: MoEGPT) -> Kept:
        """Return what all passes need; it is computed once."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to continue. Several continuations of a prompt are several requests with different seeds."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int = 200
    """Tokens to make at most; 0 only scores the prompt. The context may end the answer before."""
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    """The same request with the same seed gets the same answer."""
    ends: Collection[int] = ()
    """Tokens that end the answer, and are no part of it."""
    text: TextStream | None = None
    """Turns the tokens into text and knows the stop strings; None makes tokens only."""
    n_logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones. None reports nothing."""
    scores_prompt: bool = False
    """Report that of the prompt's tokens, too."""
    beside: Beside | None = None
    """What the tokens read beside the text; None is text alone, for which nothing more is computed."""

    @property
    def digest(self) -> str:
        """Of what is beside the text; empty for text alone."""
        return self.beside.digest if self.beside else ""


class TokenScore(NamedTuple):
    """Log-probabilities under the model's own distribution: before temperature, top-k and top-p."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: list[tuple[int, float]]
    """The most likely tokens, the most likely first."""


class Chosen(NamedTuple):
    """What is kept of a layer's routing: not its scores of all experts, which are many times larger."""

    indices: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]


class TokenExperts(NamedTuple):
    """The experts of one position in each layer. They are looked up when somebody asks."""

    chosen: Sequence[Chosen]
    place: int

    def indices(self) -> list[list[int]]:
        """Return K experts for each layer, none for a dense model."""
        return [layer.indices[self.place].tolist() for layer in self.chosen]

    def weights(self) -> list[list[float]]:
        """Return their weights."""
        return [layer.weights[self.place].tolist() for layer in self.chosen]


Finish = Literal["stop", "length", "cancelled", "error"]


class Event(NamedTuple):
    """What a step did for a request: made a token, scored the prompt, ended the answer, or several of these."""

    request_id: int
    token: int | None = None
    """The new token; None where the event brings none."""
    text: str = ""
    """Text that can be shown now."""
    finish: Finish | None = None
    """Why the answer ends with this event: end-of-text or a stop string, a limit, ``cancel``, or a failure."""
    score: TokenScore | None = None
    """Of the new token, where asked for."""
    prompt_scores: list[TokenScore] | None = None
    """Of the prompt's tokens, where asked for, in the first event."""
    experts: TokenExperts | None = None
    """The experts that computed the position from which the token was sampled."""
    error: str = ""
    """What failed."""
