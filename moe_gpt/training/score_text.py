"""Loss and bits per byte of any text, with a window that slides over it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_gpt.data.read_back import first_of, what_is_lost
from moe_gpt.data.tokenizer import Tokenizer, in_groups
from moe_gpt.errors import InputError
from moe_gpt.inference.generate import checked_context
from moe_gpt.model.losses import IGNORED_TARGET, cross_entropy
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast
from moe_gpt.training.evaluation import Score


@torch.inference_mode()
def score_documents(
    model: MoEGPT,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    precision: Precision,
    stride: int,
    batch_tokens: int = 16_384,
    context: int | None = None,
) -> Score:
    """Score any text with a window that moves by ``stride`` tokens.

    Every token is predicted once. Its context is at least the windows' length minus ``stride`` tokens, if the document
    has that many before it. End-of-text precedes the first token and is not scored. The bits per byte are therefore
    comparable with those of other tokenizers and other code.

    Args:
        model: its mode is restored afterwards.
        documents: each is scored on its own.
        stride: from 1 (slowest, most context) to the context.
        context: length of the windows; ``max_seq_len`` of the model by default.
        batch_tokens: tokens in one forward pass.

    Warns where the tokenizer loses text of the first documents.
    """
    length, device = checked_context(model, context), model.embedding.weight.device
    if not 1 <= stride <= length:
        raise InputError(f"the stride must be from 1 to the context of {length} tokens, got {stride}")
    nats, n_tokens, n_bytes = 0.0, 0, 0
    with evaluating(model):
        windows = _windows(tokenizer, _read_back(tokenizer, documents), length, stride)
        for batch in in_groups(windows, lambda window: 1, max(1, batch_tokens // length)):
            inputs, targets = (_padded([getattr(window, name) for window in batch]) for name in ("inputs", "targets"))
            with autocast(device, precision):
                logits = model(inputs.clamp(min=0).to(device)).logits
            ce = cross_entropy(logits, targets.to(device))
            nats, n_tokens = nats + float(ce.total), n_tokens + int(ce.n_valid)
            n_bytes += sum(window.n_bytes for window in batch)
    if not n_tokens:
        raise InputError("there is no text to score")
    return Score(nats / n_tokens, nats / math.log(2) / n_bytes, n_tokens)


def _read_back(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[str]:
    first, documents = first_of(documents, len)
    if lost := what_is_lost(first, tokenizer, "the documents"):
        warnings.warn(lost, stacklevel=3)
    return documents


class _Window(NamedTuple):
    inputs: list[int]
    targets: list[int]
    """Tokens to score; IGNORED_TARGET for those that an earlier window scored."""
    n_bytes: int
    """Bytes of the whole document in its first window; 0 in the others."""


def _windows(tokenizer: Tokenizer, documents: Iterable[str], length: int, stride: int) -> Iterator[_Window]:
    for text in documents:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
        n_scored = 0
        for start in range(0, len(ids) - 1, stride):
            end = min(start + length, len(ids) - 1)
            n_known = n_scored - start
            targets = [IGNORED_TARGET] * n_known + ids[n_scored + 1 : end + 1]
            yield _Window(ids[start:end], targets, 0 if start else len(text.encode()))
            n_scored = end
            if end == len(ids) - 1:
                break


def _padded(rows: list[list[int]]) -> Tensor:
    """Pad rows on the right; attention is causal, so the padding changes no score."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=IGNORED_TARGET
    )
