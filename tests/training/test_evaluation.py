"""Scores of any text: every token once, with the context that the stride promises."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.training.evaluation import Evaluator, Score, format_positions
from moe_gpt.training.score_text import score_documents

TEXTS = ["the quick brown fox jumps over the lazy dog " * 3, "a", "na\u00efve caf\u00e9", "", "x" * 31]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer([TEXTS[0] * 5], 270)
    return tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=16), tokenizer


@torch.no_grad()
def by_hand(model, tokenizer, text: str, stride: int) -> tuple[float, int]:
    """Predict each token from the window that first reaches it, one token at a time."""
    ids, nats = [tokenizer.end_of_text_id, *tokenizer.encode(text)], 0.0
    length = model.config.max_seq_len
    for place in range(1, len(ids)):
        start = 0 if place <= length else -(-(place - length) // stride) * stride
        logits = model.eval()(torch.tensor([ids[start:place]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[place]].item()
    return nats, len(ids) - 1


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_every_token_is_scored_once_with_its_context(model_and_tokenizer, stride):
    """Against a loop over tokens; however the windows are put into batches."""
    model, tokenizer = model_and_tokenizer
    expected = [by_hand(model, tokenizer, text, stride) for text in TEXTS]
    nats, n_tokens = (sum(column) for column in zip(*expected, strict=True))
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    for batch_tokens in (16, 64, 10_000):
        score = score_documents(model, tokenizer, TEXTS, "fp32", stride, batch_tokens)
        assert score.n_tokens == n_tokens
        assert score.ce_loss == pytest.approx(nats / n_tokens, abs=1e-4)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)


def test_impossible_strides_and_empty_texts_are_refused(model_and_tokenizer):
    """With the range; and where there is nothing to score."""
    model, tokenizer = model_and_tokenizer
    for stride in (0, 17):
        with pytest.raises(InputError, match=f"from 1 to the context of 16 tokens, got {stride}"):
            score_documents(model, tokenizer, TEXTS, "fp32", stride)
    with pytest.raises(InputError, match="no text to score"):
        score_documents(model, tokenizer, [""], "fp32", 8)


def test_mode_is_restored(model_and_tokenizer):
    """A model that is being trained goes on being trained."""
    model, tokenizer = model_and_tokenizer
    model.train()
    score_documents(model, tokenizer, TEXTS, "fp32", 8)
    assert model.training


def test_perplexity_beyond_floats_is_infinite():
    """A loss whose exponential is beyond floats gives infinity, not an error."""
    assert Score(1e6, 1.0, 1).perplexity == math.inf
    assert Score(2.0, 1.0, 1).perplexity == pytest.approx(7.389, abs=1e-3)


@torch.no_grad()
def test_loss_by_position_adds_up(model_and_tokenizer):
    """The positions' means, weighted, are the whole mean; the buckets double from 64."""
    _, tokenizer = model_and_tokenizer
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=200)
    tokens = np.array(tokenizer.encode(TEXTS[0] * 40))
    validation = SimpleNamespace(tokens=tokens, bytes_per_token_byte=1.0)
    source = SimpleNamespace(config=SimpleNamespace(name="a"), validation=validation)
    evaluator = Evaluator([source], tokenizer, seq_len=200, max_tokens=1000, batch_tokens=400)
    positions, score = evaluator.by_position(model, "fp32")["a"], evaluator(model, "fp32")["a"]
    assert [(p.start, p.end) for p in positions] == [(0, 64), (64, 128), (128, 200)]
    mean = sum((p.end - p.start) * p.ce_loss for p in positions) / 200
    assert mean == pytest.approx(score.ce_loss, abs=1e-5)
    assert model.training
    rows = format_positions({"a": positions}).splitlines()
    assert rows[1].split() == ["0", "to", "63", f"{positions[0].ce_loss:.4f}"]
