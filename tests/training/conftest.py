"""What several tests of training share."""

from __future__ import annotations

import math

import pytest
import torch

from moe_gpt.training import loop


@pytest.fixture
def poison(monkeypatch):
    """Make the loss infinite for every batch that has a token of the stream in one of the given ranges."""
    bad: list[range] = []
    real = loop.train_step

    def train_step(state, micro_batches, plan, config, precision, with_norms=False):
        tokens = range(state.tokens_seen, state.tokens_seen + plan.batch_tokens)
        if any(tokens.start < window.stop and window.start < tokens.stop for window in bad):
            with torch.no_grad():
                kept = state.model.final_norm.weight[0].clone()
                state.model.final_norm.weight[0] = math.inf
            result = real(state, micro_batches, plan, config, precision, with_norms)
            with torch.no_grad():
                state.model.final_norm.weight[0] = kept
            return result
        return real(state, micro_batches, plan, config, precision, with_norms)

    monkeypatch.setattr(loop, "train_step", train_step)
    return bad
