"""Which tokens go where, as text: tokens that experts prefer, and sample text with the expert of each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.measure import routing
from moe_gpt.report import recorded_routing as recorded
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Table
from moe_gpt.report.run_records import EvaluationArrays, RunRecords, Slice
from moe_gpt.report.series import spread

_MOST_LAYERS = 8
"""Layers that can be picked; of more, so many are shown, evenly spread."""
_MOST_TOKENS = 6000
"""Tokens of sample text on a page, those of all layers together."""
_MIN_COUNT = 10
"""Tokens that occur less often say little about an expert."""
N_COLOURS = 16
"""Colours of experts in text; beyond them they repeat, and the number in a token's tooltip tells them apart."""


@dataclass(frozen=True)
class FavouriteToken:
    """A token that an expert sees beyond chance."""

    text: str
    percent: float
    """Of the token's occurrences that go to the expert."""
    count: int


@dataclass(frozen=True)
class RoutedToken:
    """A token of sample text."""

    text: str
    colour: int
    experts: str


@dataclass(frozen=True)
class RoutedSample:
    """Text of one source."""

    source: str
    tokens: list[RoutedToken]


@dataclass(frozen=True)
class Layer:
    """What a layer picker shows for one layer."""

    index: int
    favourites: list[list[FavouriteToken]]
    """By expert."""
    samples: list[RoutedSample]


def favourite_tokens(run: RunRecords) -> list[Layer]:
    """Return for each layer the tokens that its experts see most beyond chance."""
    arrays, n_experts = recorded.last_with_choices(run), recorded.n_experts_of(run)
    tokens, choices = recorded.joined_tokens(arrays), recorded.joined_choices(arrays)
    top, layers = 8 if n_experts <= 32 else 5, []
    for index in spread(len(choices), _MOST_LAYERS):
        shares = routing.vocabulary_specialisation(tokens, choices[index], n_experts, _MIN_COUNT, top)
        favourites = [
            [FavouriteToken(show_token(run.tokenizer, s.token), 100 * s.share, s.count) for s in expert]
            for expert in shares
        ]
        layers.append(Layer(index, favourites, []))
    return layers


def routed_samples(run: RunRecords, n_tokens: int = 300) -> list[Layer]:
    """Return for each layer the start of every source's kept slice with the experts of each token.

    Args:
        run: with kept slices.
        n_tokens: of each source; fewer where many sources and layers would make the page large.
    """
    kept = recorded.last_with_choices(run).slices
    sources = [source for source in recorded.in_order(run, kept) if kept[source].choices.size]
    shown = spread(max(len(kept[source].choices) for source in sources), _MOST_LAYERS)
    n_tokens = min(n_tokens, max(50, _MOST_TOKENS // (len(sources) * len(shown))))

    return [
        Layer(layer, [], [_sample(run.tokenizer, source, kept[source], layer, n_tokens) for source in sources])
        for layer in shown
    ]


def _sample(tokenizer: Tokenizer | None, source: str, kept: Slice, layer: int, n_tokens: int) -> RoutedSample:
    chosen = kept.choices[layer].reshape(-1, kept.choices.shape[-1])[:n_tokens]
    pairs = zip(kept.tokens.ravel()[:n_tokens].tolist(), chosen.tolist(), strict=True)
    return RoutedSample(source, [_route(tokenizer, *pair) for pair in pairs])


def _route(tokenizer: Tokenizer | None, token: int, experts: list[int]) -> RoutedToken:
    text = show_token(tokenizer, token, keep_spaces=True)
    return RoutedToken(text, experts[0] % N_COLOURS, ", then ".join(map(str, experts)))


def colour_names(run: RunRecords) -> list[str]:
    """Return the experts of each colour."""
    n_experts = recorded.n_experts_of(run)
    return [", ".join(map(str, range(c, n_experts, N_COLOURS))) for c in range(min(N_COLOURS, n_experts))]


def concentration_table(run: RunRecords) -> Table:
    """Return how far the token alone, and the expert before, decide the expert: by layer, with chance."""
    arrays, n_experts = recorded.last_with_choices(run), recorded.n_experts_of(run)
    tokens, rows = recorded.joined_tokens(arrays), []
    for index, choices in enumerate(recorded.joined_choices(arrays)):
        concentration = routing.token_concentration(tokens, choices, n_experts, _MIN_COUNT)
        values = (concentration, choices.shape[-1] / n_experts, *_locality(arrays, index))
        rows.append((index, *(float(f"{100 * value:.3g}") for value in values)))
    places = ("token concentration (%)", "by chance (%)", "neighbours with the same first expert (%)", "by chance (%)")
    return Table(("layer", *places), rows)


def _locality(arrays: EvaluationArrays, layer: int) -> np.ndarray:
    """Return how often neighbours have the same first expert, and chance (2,): the means over the sources' slices."""
    parts = [part.choices[layer] for part in arrays.slices.values() if part.choices.shape[2] > 1]
    need(parts, "the kept slices are single tokens")
    return np.mean([routing.routing_locality(part) for part in parts], axis=0)


def show_token(tokenizer: Tokenizer | None, token: int, keep_spaces: bool = False) -> str:
    """Return a token's text with visible spaces, line ends and control characters; its id without a tokenizer.

    Args:
        tokenizer: of the run, if it could be read.
        token: the id.
        keep_spaces: for running text: spaces stay, and lines end after the sign for it.
    """
    text = show_controls(_decode(tokenizer, token))
    if not text:
        return f"#{token} "
    return text.replace("\n", "↵\n") if keep_spaces else text.replace("\n", "↵").replace(" ", "␣")


def _decode(tokenizer: Tokenizer | None, token: int) -> str:
    try:
        return tokenizer.decode([token]) if tokenizer else ""
    except (IndexError, OverflowError, TypeError, ValueError):
        return ""


_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) != "\n"},
    **{ord(character): f"U+{ord(character):04X}" for character in _DIRECTIONS},
    ord("\t"): "⇥",
    0x7F: "␡",
}


def show_controls(text: str) -> str:
    """Return text with pictures of control characters, which pages may not contain; line ends stay.

    Characters that turn the direction of text are shown by their numbers: they would turn the page around them.
    """
    return text.translate(_SHOWN)
