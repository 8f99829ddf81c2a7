"""Samples the next tokens of several sequences at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_gpt.config.section import AtMostOne, CountOrZero, NonNegative, Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How the next token is sampled."""

    temperature: NonNegative = 0.8
    """Divides the logits; 0 chooses the most likely token."""
    top_k: CountOrZero = 0
    """Sample from this many most likely tokens; 0 samples from all."""
    top_p: AtMostOne = 1.0
    """Sample from the most likely tokens that together have this probability (nucleus, arXiv 1904.09751)."""


_LEAST_TEMPERATURE = 1e-30
DAMAGED = (
    "no token can be sampled, because the model's logits are not finite (NaN or infinite); the weights are "
    "damaged, or training diverged, so use an earlier checkpoint"
)


def next_token_probs(logits: Float[Tensor, "B V"], samplings: Sequence[SamplingConfig]) -> Float[Tensor, "B V"]:
    """Return the distribution of each sequence's next token, after temperature, then top-k, then top-p, in float32.

    The numbers of a row do not depend on the other rows. The logits must be finite.
    """
    # below the least temperature, float32 would divide 0 by 0; temperature 0 is one_hot below
    temperatures = _column([max(sampling.temperature, _LEAST_TEMPERATURE) for sampling in samplings], logits)
    logits = logits.float()
    # the largest is 0: nothing overflows
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperatures).softmax(dim=-1)
    limited = [row for row, s in enumerate(samplings) if 0 < s.top_k < logits.shape[1] or s.top_p < 1]
    if limited:
        chosen = [samplings[row] for row in limited]
        probs[limited] = _most_likely(probs[limited], chosen)
    greedy = [row for row, sampling in enumerate(samplings) if sampling.temperature == 0]
    if greedy:
        probs[greedy] = torch.nn.functional.one_hot(logits[greedy].argmax(-1), logits.shape[1]).float()
    return probs


def _most_likely(probs: Float[Tensor, "B V"], samplings: Sequence[SamplingConfig]) -> Float[Tensor, "B V"]:
    """Keep top-k, then top-p of what is kept, and let the rest sum to 1. Ties keep the first token."""
    ordered, order = probs.sort(descending=True, stable=True)
    V = probs.shape[1]
    place = torch.arange(V, device=probs.device)
    top_k = _column([sampling.top_k or V for sampling in samplings], probs)
    ordered = ordered.masked_fill(place >= top_k, 0.0)
    ordered /= ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered  # probability of everything more likely
    top_p = _column([sampling.top_p for sampling in samplings], probs)
    ordered = ordered.masked_fill((before >= top_p) & (place > 0), 0.0)
    ordered /= ordered.sum(-1, keepdim=True)
    return torch.empty_like(probs).scatter_(1, order, ordered)


def _column(numbers: Sequence[float], like: Tensor) -> Float[Tensor, "B 1"]:
    return torch.tensor(numbers, dtype=torch.float32, device=like.device)[:, None]


def draw(probs: Float[Tensor, "B V"], uniforms: Sequence[float]) -> Int[Tensor, "B"]:
    """Return one token of each row: where the cumulated probability exceeds the row's number from [0, 1).

    A token of probability 0 is never drawn.
    """
    cumulated = probs.double().cumsum(-1)
    total = cumulated[:, -1:]
    targets = torch.tensor(uniforms, dtype=torch.float64, device=probs.device)[:, None] * total
    targets = torch.minimum(targets, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, targets, right=True)[:, 0]


def sample(
    logits: Float[Tensor, "B V"], samplings: Sequence[SamplingConfig], uniforms: Sequence[float]
) -> Int[Tensor, "B"]:
    """Return one token of each row; ``uniforms`` are read where the temperature is not 0."""
    if all(sampling.temperature == 0 for sampling in samplings):
        return logits.argmax(-1)
    return draw(next_token_probs(logits, samplings), uniforms)


def are_finite(logits: Float[Tensor, "B V"]) -> Bool[Tensor, "B"]:
    """Return which rows can be sampled: those of damaged weights are NaN or infinite (``DAMAGED`` says so)."""
    return logits.isfinite().all(-1)
