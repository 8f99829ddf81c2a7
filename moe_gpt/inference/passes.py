"""One pass of the model over the new tokens of several sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_gpt.inference.request import Chosen, Span
from moe_gpt.inference.rows import Piece, RowCache
from moe_gpt.inference.running import Running
from moe_gpt.model.transformer import MoEGPT


class Work(NamedTuple):
    """What a sequence brings to a pass."""

    running: Running
    tokens: list[int]
    """Those that it has not read; where it decodes, guesses behind its last token too."""
    n_known: int
    """Tokens that are no guesses."""
    reaches_end: bool
    """Whether the pass reads all that is known, so that a token can be sampled."""

    @property
    def first_wanted(self) -> int:
        """The first of the tokens whose logits are wanted; those of all later ones are, too."""
        if self.running.scores_prompt:
            return 0
        return self.n_known - 1 if self.reaches_end else len(self.tokens)


class Result(NamedTuple):
    """What a pass returns to a sequence."""

    work: Work
    logits: Float[Tensor, "W V"]
    """After each wanted token, in float32."""
    chosen: Sequence[Chosen]
    """Of all tokens of the pass, for each layer that has experts."""
    start: int
    """Where its tokens begin among those."""

    @property
    def sampled(self) -> Float[Tensor, "k+1 V"]:
        """The logits after the last known token and after each guess."""
        return self.logits[-1 - len(self.work.tokens) + self.work.n_known :]


def run_pass(model: MoEGPT, rows: RowCache, works: Sequence[Work]) -> list[Result]:
    """Return each sequence's result, in any order."""
    work_of_row = {work.running.row: work for work in works}
    pieces = rows.place([Piece(work.running.row, work.running.n_cached, work.tokens) for work in works])
    ordered = [work_of_row[piece.row] for piece in pieces]
    device = model.embedding.weight.device
    tokens = torch.tensor([[token for work in ordered for token in work.tokens]], device=device)
    with _reading(model, ordered):
        hidden, routings = model.hidden_states(tokens, cache=rows)
    logits = model.output(hidden[0, torch.tensor(_wanted(ordered), dtype=torch.long, device=device)]).float()
    parts = logits.split([len(work.tokens) - work.first_wanted for work in ordered])
    starts = accumulate((len(work.tokens) for work in ordered), initial=0)
    chosen = [Chosen(routing.expert_indices.contiguous(), routing.expert_weights) for routing in routings]
    return [Result(work, part, chosen, start) for work, part, start in zip(ordered, parts, starts, strict=False)]


def _reading(model: MoEGPT, works: Sequence[Work]) -> contextlib.AbstractContextManager[None]:
    """Let the tokens read what their requests keep beside the text."""
    spans, start = list[Span](), 0
    for work in works:
        if work.running.kept is not None:
            spans.append(Span(work.running.kept, start, work.running.n_cached, len(work.tokens)))
        start += len(work.tokens)
    return spans[0].kept.read_by(model, spans) if spans else contextlib.nullcontext()


def _wanted(works: Sequence[Work]) -> list[int]:
    """Return the places, among the tokens of all, of those whose logits are wanted."""
    wanted, start = list[int](), 0
    for work in works:
        wanted += range(start + work.first_wanted, start + len(work.tokens))
        start += len(work.tokens)
    return wanted
