"""What several tests of training share."""

from __future__ import annotations

import math

import pytest
import torch

from moe_gpt.training.loop import pretraining_step


class Poison(list):
    """Ranges of the stream whose batches are bad: their loss is infinite."""

    def take_step(self, run, plan, should_record):
        """Take a step as training does, with an infinite weight where the batch has a token of a bad range."""
        state = run.state
        tokens = range(state.tokens_seen, state.tokens_seen + plan.batch_tokens)
        if not any(tokens.start < window.stop and window.start < tokens.stop for window in self):
            return pretraining_step(run, plan, should_record)
        with torch.no_grad():
            kept = state.model.final_norm.weight[0].clone()
            state.model.final_norm.weight[0] = math.inf
        result = pretraining_step(run, plan, should_record)
        with torch.no_grad():
            state.model.final_norm.weight[0] = kept
        return result


@pytest.fixture
def poison() -> Poison:
    """A step that fails where it is told to; give its ``take_step`` to the run."""
    return Poison()
