"""The coordinate check: activations grow with the width under standard scales, and keep their size under muP."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_gpt.config import ModelConfig, OptimizerConfig, Scales
from moe_gpt.errors import InputError
from moe_gpt.studies import coordinates as coordinates_module
from moe_gpt.studies.coordinates import coordinate_slopes, coordinates, widened
from moe_gpt.studies.plan import load_study
from moe_gpt.training import optimizer as optimizer_module

TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
NARROW = ModelConfig(
    vocab_size=256, n_layers=2, d_model=32, n_heads=2, head_dim=16, d_ff=32, n_experts=8, max_seq_len=64
)  # fmt: skip
ADAM = OptimizerConfig(name="adamw", lr=4e-3, weight_decay=0.0)


def read(seed: int, step: int) -> Tensor:
    """Return 32 sequences of a module's bytes."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    starts = torch.randint(len(TEXT) - 65, (32,), generator=generator)
    return torch.stack([TEXT[start : start + 65] for start in starts])


def slopes(widths: list[int], seeds: list[int], n_steps: int) -> dict[str, dict[str, float]]:
    """Return the slopes of the narrow model made wider."""
    return coordinate_slopes(NARROW, ADAM, widths, seeds, n_steps, read)


def test_experts_grow_without_mup_and_not_with_it():
    """Three widths and one seed are enough to see the difference."""
    found = slopes([32, 64, 128], [0], 3)
    assert found["standard"].keys() == found["mup"].keys() >= {"attention 1", "router logits 0", "experts 1", "logits"}
    assert found["standard"]["experts 1"] > 0.9
    assert found["mup"]["experts 1"] < 0.6


@pytest.mark.slow
def test_coordinates_over_three_seeds():
    """Without muP every layer's outputs grow at least as width^0.9; with it all are within ±0.5."""
    found = slopes([32, 64, 128, 256], [0, 1, 2], 5)
    of_layers = [slope for name, slope in found["standard"].items() if name != "logits"]
    assert min(of_layers) > 0.9
    assert found["standard"]["logits"] > 0.7
    assert all(abs(slope) < 0.5 for slope in found["mup"].values())


@pytest.mark.slow
def test_a_router_whose_rate_is_not_scaled_is_seen(monkeypatch):
    """Its logits grow, which the loss does not show in so few steps."""
    scales_of = optimizer_module.scales_of

    def wrong(model: ModelConfig, name: str) -> Scales:
        return Scales(1.0, 1.0, 1.0) if "router" in name else scales_of(model, name)

    monkeypatch.setattr(optimizer_module, "scales_of", wrong)
    found = slopes([32, 64, 128, 256], [0, 1, 2], 5)["mup"]
    assert min(found["router logits 0"], found["router logits 1"]) > 0.5


def test_a_wider_model_keeps_its_ratios():
    """Heads and d_ff go with the width; one that breaks them is refused, as is a single width."""
    wide = widened(NARROW, 96)
    assert (wide.d_model, wide.n_heads, wide.d_ff, wide.head_dim) == (96, 6, 96, 16)
    with pytest.raises(InputError, match="at width 40, n_heads would be no whole number"):
        widened(NARROW, 40)
    with pytest.raises(InputError, match=r"coordinates\.widths must be at least two different ones, got \[32\]"):
        slopes([32], [0], 1)


@pytest.mark.parametrize(("of_arm", "lr"), [(None, 1e-3), ("fast", 9e-3)])
def test_model_and_learning_rate_are_those_of_the_arm_that_is_named(write_study, tmp_path, monkeypatch, of_arm, lr):
    """Or of the first one."""
    arms = {"slow": {"overrides": ["optimizer.lr=1e-3"]}, "fast": {"overrides": ["optimizer.lr=9e-3"]}}
    asked = {"widths": [32, 64], "of_arm": of_arm}
    study = load_study(write_study(arms=arms, comparisons=None, coordinates=asked), tmp_path / "out")
    monkeypatch.setattr(coordinates_module, "coordinate_slopes", lambda *given: given)
    assert coordinates(study)[1].lr == lr
