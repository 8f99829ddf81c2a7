"""Which tokens go where, as text: tokens that experts prefer, and sample text with the expert of each token."""

from __future__ import annotations

import numpy as np

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.measure import routing
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import MOST_LAYERS, Table
from moe_gpt.report.recorded import EvaluationArrays, RunRecords
from moe_gpt.report.series import spread

_MOST_TOKENS = 6000
"""Tokens of sample text on a page, those of all layers together."""
_MIN_COUNT = 10
"""Tokens that occur less often say little about an expert."""
_N_COLOURS = 16
"""Colours of experts in text; beyond them they repeat, and the number in a token's tooltip tells them apart."""


def favourite_tokens(run: RunRecords) -> list[tuple[int, list[list[tuple[str, float]]]]]:
    """Return for each layer and expert the tokens that it sees most beyond chance.

    With each token is the percentage of its occurrences that go to the expert.
    """
    arrays, n_experts = run.last_with_choices(), run.n_experts
    tokens, choices = arrays.tokens(), arrays.choices()
    top, layers = 8 if n_experts <= 32 else 5, []
    for layer in spread(len(choices), MOST_LAYERS):
        found = routing.vocabulary_specialisation(tokens, choices[layer], n_experts, _MIN_COUNT, top)
        layers.append((layer, [[(show_token(run.tokenizer, s.token), 100 * s.share) for s in of] for of in found]))
    return layers


def routed_samples(run: RunRecords, n_tokens: int = 300) -> list[tuple[int, dict[str, list[tuple[str, list[int]]]]]]:
    """Return for each layer and source the start of the kept slice: tokens with their experts, best first.

    Args:
        run: with kept slices.
        n_tokens: of each source; fewer where many sources and layers would make the page large.
    """
    slices = run.last_with_choices().slices
    kept = {source: slices[source] for source in run.in_order(slices) if slices[source].choices.size}
    shown = spread(max(len(part.choices) for part in kept.values()), MOST_LAYERS)
    n_tokens = min(n_tokens, max(50, _MOST_TOKENS // (len(kept) * len(shown))))
    layers: list[tuple[int, dict]] = [(layer, {}) for layer in shown]
    for source, part in kept.items():
        texts = [show_token(run.tokenizer, token, keep_spaces=True) for token in part.tokens.flat[:n_tokens].tolist()]
        for layer, by_source in layers:
            chosen = part.choices[layer].reshape(-1, part.choices.shape[-1])[:n_tokens]
            by_source[source] = list(zip(texts, chosen.tolist(), strict=True))
    return layers


def colour_names(run: RunRecords) -> list[str]:
    """Return the experts of each colour."""
    n_experts = run.n_experts
    return [", ".join(map(str, range(c, n_experts, _N_COLOURS))) for c in range(min(_N_COLOURS, n_experts))]


def concentration_table(run: RunRecords) -> Table:
    """Return how far the token alone, and the expert before, decide the expert: by layer, with chance."""
    arrays, n_experts = run.last_with_choices(), run.n_experts
    tokens, rows = arrays.tokens(), []
    for index, choices in enumerate(arrays.choices()):
        concentration = routing.token_concentration(tokens, choices, n_experts, _MIN_COUNT)
        values = (concentration, choices.shape[-1] / n_experts, *_locality(arrays, index))
        rows.append((index, *(float(f"{100 * value:.3g}") for value in values)))
    places = ("token concentration (%)", "by chance (%)", "neighbours with the same first expert (%)", "by chance (%)")
    title = "How strongly a token and the token before it determine the expert (tokens that occur 10 times or more)"
    return Table(("layer", *places), rows, title)


def _locality(arrays: EvaluationArrays, layer: int) -> np.ndarray:
    """Return how often neighbours have the same first expert, and chance (2,): the means over the sources' slices."""
    parts = [part.choices[layer] for part in arrays.slices.values() if part.choices.shape[2] > 1]
    need(parts, "the recorded sequences have only one token each")
    return np.mean([routing.routing_locality(part) for part in parts], axis=0)


def show_token(tokenizer: Tokenizer | None, token: int, keep_spaces: bool = False) -> str:
    """Return a token's text with visible spaces, line ends and control characters; its id without a tokenizer.

    Args:
        tokenizer: of the run, if it could be read.
        token: the id.
        keep_spaces: for running text: spaces stay, and lines end after the sign for it.
    """
    try:
        text = show_controls(tokenizer.decode([token])) if tokenizer else ""
    except (IndexError, OverflowError, TypeError, ValueError):
        text = ""
    if not text:
        return f"#{token} "
    return text.replace("\n", "↵\n") if keep_spaces else text.replace("\n", "↵").replace(" ", "␣")


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
