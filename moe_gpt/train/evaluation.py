"""Loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from moe_gpt.data.prepare import PreparedSource
from moe_gpt.data.stream import ValidationRows, validation_rows
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.device import Precision, autocast
from moe_gpt.model.losses import cross_entropy
from moe_gpt.model.transformer import MoEGPT


class Score(NamedTuple):
    """The result on one source."""

    ce_loss: float
    """Mean cross entropy in nats per token."""
    bits_per_byte: float
    """Total bits over the bytes of the predicted text; end-of-text costs bits and has no bytes."""
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """E to the cross entropy."""
        return math.exp(self.ce_loss)


class Evaluator:
    """Scores a model on the same held-out tokens every time.

    Args:
        sources: their validation splits are read.
        tokenizer: tells how many bytes a token stands for.
        seq_len: length of the scored sequences, the run's longest.
        max_tokens: tokens per source.
        batch_tokens: tokens per forward pass.
    """

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        tokenizer: Tokenizer,
        seq_len: int,
        max_tokens: int,
        batch_tokens: int,
    ) -> None:
        self._rows = {s.config.name: validation_rows(s.validation.tokens, seq_len, max_tokens) for s in sources}
        self._token_bytes = tokenizer.token_bytes()
        self._batch_tokens = batch_tokens

    def __call__(self, model: MoEGPT, precision: Precision) -> dict[str, Score]:
        """Return each source's score. The model's mode and all random generators are left as they were."""
        was_training = model.training
        model.eval()
        try:
            return {name: self._score(model, rows, precision) for name, rows in self._rows.items()}
        finally:
            model.train(was_training)

    @torch.inference_mode()
    def _score(self, model: MoEGPT, rows: ValidationRows, precision: Precision) -> Score:
        device = model.embedding.weight.device
        per_batch = max(1, self._batch_tokens // rows.inputs.shape[1])
        nats = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        for start in range(0, len(rows.inputs), per_batch):
            inputs = torch.from_numpy(rows.inputs[start : start + per_batch]).to(device)
            targets = torch.from_numpy(rows.targets[start : start + per_batch]).to(device)
            with autocast(device, precision):
                logits = model(inputs).logits
            nats += cross_entropy(logits, targets).total.to(nats.device)
        total, n_tokens = float(nats), rows.targets.size
        n_bytes = int(self._token_bytes[rows.targets].sum())
        return Score(total / n_tokens, total / math.log(2) / max(1, n_bytes), int(np.int64(n_tokens)))


def format_scores(scores: dict[str, Score]) -> str:
    """Return the scores as a table for people."""
    width = max(len("source"), *map(len, scores))
    lines = [f"{'source':<{width}}  {'tokens':>9}  {'ce_loss':>8}  {'perplexity':>10}  {'bits_per_byte':>13}"]
    lines += [
        f"{name:<{width}}  {s.n_tokens:>9,}  {s.ce_loss:>8.4f}  {s.perplexity:>10.2f}  {s.bits_per_byte:>13.4f}"
        for name, s in scores.items()
    ]
    return "\n".join(lines)
