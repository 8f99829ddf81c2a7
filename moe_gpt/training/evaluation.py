"""Loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_gpt.data.batches import MicroBatch, deal_batch, part_of
from moe_gpt.data.prepare import PreparedSource
from moe_gpt.data.stream import Batch, validation_rows
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.distributed.process import SOLO, Team
from moe_gpt.distributed.sharding import reshard
from moe_gpt.measure.positions import position_buckets
from moe_gpt.model.losses import IGNORED_TARGET
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast
from moe_gpt.terminal.tables import format_table


class Score(NamedTuple):
    """The result on one source."""

    ce_loss: float
    """Mean cross entropy in nats per token."""
    bits_per_byte: float
    """Total bits over the bytes of the predicted text. End-of-text costs bits and has no bytes."""
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the cross entropy; infinite if that exceeds a float."""
        return math.exp(self.ce_loss) if self.ce_loss < 700 else math.inf


class PositionScore(NamedTuple):
    """The result on the positions [start, end) of all sequences."""

    start: int
    end: int
    ce_loss: float
    """Mean cross entropy in nats per token."""


class SourceEvaluation(NamedTuple):
    """The evaluation of one source, by position in the sequence."""

    nats: np.ndarray
    """Summed cross entropy at each position (T,)."""
    counts: np.ndarray
    """Scored tokens at each position (T,)."""
    n_bytes: int
    """Bytes of the scored text. End-of-text has none."""
    tokens_per_expert: np.ndarray | None
    """Assignments (L, E); None for a dense model."""

    @property
    def score(self) -> Score:
        """The result on the whole source."""
        n_tokens, total = int(self.counts.sum()), float(self.nats.sum())
        return Score(total / n_tokens, total / math.log(2) / max(1, self.n_bytes), n_tokens)

    def by_position(self) -> list[PositionScore]:
        """Return the mean of positions 0 to 63, 64 to 127, 128 to 255 and so on."""
        return [
            PositionScore(start, end, float(self.nats[start:end].sum() / max(1, self.counts[start:end].sum())))
            for start, end in position_buckets(len(self.nats))
        ]


class Evaluator:
    """Scores a model on the same held-out tokens every time.

    Args:
        sources: only their validation splits are read; those without held-out text have no score.
        tokenizer: knows the bytes of each token.
        seq_len: length of the scored sequences.
        max_tokens: tokens per source.
        batch_tokens: tokens per forward pass.
        keeps_documents_apart: as with ``data.document_masking``: a token after end-of-text is not scored.
    """

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        tokenizer: Tokenizer,
        seq_len: int,
        max_tokens: int,
        batch_tokens: int,
        keeps_documents_apart: bool = False,
    ) -> None:
        sources = [source for source in sources if len(source.validation.tokens)]
        self._end = tokenizer.end_of_text_id if keeps_documents_apart else None
        self._rows = {s.config.name: validation_rows(s.validation.tokens, seq_len, max_tokens) for s in sources}
        self._token_bytes = tokenizer.token_bytes()
        self._bytes_per_token_byte = {s.config.name: s.validation.bytes_per_token_byte for s in sources}
        self._batch_tokens = batch_tokens

    def __call__(self, model: MoEGPT, precision: Precision) -> dict[str, Score]:
        """Return each source's score. The model's mode and all random generators stay as they are."""
        return {name: evaluation.score for name, evaluation in self.evaluate(model, precision).items()}

    def by_position(self, model: MoEGPT, precision: Precision) -> dict[str, list[PositionScore]]:
        """Return each source's mean cross entropy for positions 0 to 63, 64 to 127, 128 to 255 and so on.

        A model that uses its context predicts later positions better.
        """
        return {name: evaluation.by_position() for name, evaluation in self.evaluate(model, precision).items()}

    def evaluate(self, model: MoEGPT, precision: Precision, team: Team = SOLO) -> dict[str, SourceEvaluation]:
        """Evaluate each source in one pass over its held-out tokens, of which each rank takes a part.

        The model's mode stays as it is.
        """
        # tensors of inference mode would stay in the buffers of sharded weights
        with evaluating(model), torch.inference_mode(team.size == 1), torch.no_grad():
            found = {name: self._evaluate(model, name, precision, team) for name in self._rows}
        reshard(model)
        return found

    def _evaluate(self, model: MoEGPT, name: str, precision: Precision, team: Team) -> SourceEvaluation:
        rows = self._rows[name]
        device, length = next(model.parameters()).device, rows.inputs.shape[1]
        nats, counts, tokens_per_expert, n_bytes = np.zeros(length), np.zeros(length, dtype=np.int64), None, 0
        for batch in self._micro_batches(rows, device, team):
            with autocast(device, precision):
                logits, stats = model(batch.inputs, document_ids=batch.document_ids)
            nats += _nats_by_position(logits, batch.targets)
            is_scored = (batch.targets != IGNORED_TARGET).cpu().numpy()
            counts += is_scored.sum(axis=0)
            n_bytes += int(self._token_bytes[batch.targets.cpu().numpy()[is_scored]].sum())
            if stats:
                new = stats.tokens_per_expert.cpu().numpy() * (batch.weight > 0)
                tokens_per_expert = new if tokens_per_expert is None else tokens_per_expert + new
        nats, counts, (n_bytes,) = (_summed(array, team) for array in (nats, counts, np.array([n_bytes])))
        nats = team.sum(torch.from_numpy(nats), "pipeline").numpy()
        if tokens_per_expert is not None:
            tokens_per_expert = team.sum(torch.from_numpy(_summed(tokens_per_expert, team)), "pipeline").numpy()
        return SourceEvaluation(nats, counts, round(n_bytes * self._bytes_per_token_byte[name]), tokens_per_expert)

    def slices(self, max_tokens: int) -> dict[str, np.ndarray]:
        """Return the first whole sequences (B, T) of each source's held-out tokens, about ``max_tokens`` of them."""
        return {name: rows.inputs[: max(1, max_tokens // rows.inputs.shape[1])] for name, rows in self._rows.items()}

    def _micro_batches(self, rows: Batch, device: torch.device, team: Team) -> Iterator[MicroBatch]:
        n_rows, length = rows.inputs.shape
        per_rank = max(1, self._batch_tokens // length)
        read, n_ranks = partial(part_of, rows), team.layout.data
        return deal_batch(n_rows, per_rank, read, device, self._end, team.data_rank, n_ranks)


def _nats_by_position(logits: Tensor | None, targets: Tensor) -> np.ndarray:
    """Return the summed cross entropy at each position (T,); zeros if another stage has the logits."""
    if logits is None:
        return np.zeros(targets.shape[1])
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED_TARGET
    )
    return losses.view_as(targets).cpu().double().sum(dim=0).numpy()


def _summed(array: np.ndarray, team: Team) -> np.ndarray:
    return team.sum(torch.from_numpy(array)).numpy()


def format_scores(scores: dict[str, Score]) -> str:
    """Return the scores as a table for people."""
    rows = [
        (name, f"{s.n_tokens:,}", f"{s.ce_loss:.4f}", f"{s.perplexity:.2f}", f"{s.bits_per_byte:.4f}")
        for name, s in scores.items()
    ]
    return format_table(("source", "tokens", "ce_loss", "perplexity", "bits_per_byte"), rows)


def format_positions(scores: dict[str, list[PositionScore]]) -> str:
    """Return loss by position as a table for people."""
    rows = [
        (f"{row[0].start:,} to {row[0].end - 1:,}", *(f"{score.ce_loss:.4f}" for score in row))
        for row in zip(*scores.values(), strict=True)
    ]
    return format_table(("position", *scores), rows)
