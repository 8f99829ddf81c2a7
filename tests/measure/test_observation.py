"""What is observed of a model at an evaluation, for the smallest texts too."""

from __future__ import annotations

import numpy as np
from tiny_models import tiny_model

from moe_gpt.measure.observation import mean_gradients


def test_gradients_of_single_tokens_are_none():
    """A slice of one token predicts nothing: it is left out, and alone it gives no gradients."""
    model, text = tiny_model(), np.arange(8)[None]
    assert mean_gradients(model, {"notes": np.array([[3]])}, "fp32", None) is None
    both = mean_gradients(model, {"notes": np.array([[3]]), "prose": text}, "fp32", None)
    alone = mean_gradients(model, {"prose": text}, "fp32", None)
    assert np.array_equal(both.routers, alone.routers)
