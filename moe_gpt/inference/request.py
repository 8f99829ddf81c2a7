"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.inference.text import TextStream


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
