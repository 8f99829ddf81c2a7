"""muP's factors by hand for every parameter, and what they do to initial weights and steps."""

from __future__ import annotations

import pytest
import torch

from moe_gpt.config import ModelConfig, OptimizerConfig, RunConfig, scales_of
from moe_gpt.errors import ConfigError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.step import update_weights

SHAPE = {"vocab_size": 64, "n_layers": 6, "d_model": 64, "n_heads": 2, "head_dim": 32, "d_ff": 96, "n_experts": 4}
BASE = {"d_model": 16, "d_ff": 32, "n_layers": 2}
BY_HAND = {
    "embedding.weight": (1, 1, 1 / 4),
    "attention_norm.weight": (1, 1, 1 / 4),
    "attention.qkv.weight": (1 / 2, 1 / 4, 1 / 12),
    "attention.out.weight": (12**-0.5, 1 / 12, 1 / 12),
    "feed_forward_norm.weight": (1, 1, 1 / 4),
    "feed_forward.router.weight": (1 / 4, 1 / 4, 1 / 4),
    "feed_forward.experts.gate_up": (1 / 2, 1 / 4, 1 / 12),
    "feed_forward.experts.down": (9**-0.5, 1 / 9, 1 / 12),
    "feed_forward.gate_up.weight": (1 / 2, 1 / 4, 1 / 12),
    "feed_forward.down.weight": (9**-0.5, 1 / 9, 1 / 12),
    "final_norm.weight": (1, 1, 1 / 4),
    "output.weight": (1 / 4, 1 / 4, 1 / 4),
}
"""Standard deviation, learning rate and eps at 4 times the width, 3 times the experts' width and 3 times the depth."""
EXPERTS = [{}, {"n_experts": 1, "top_k": 1}]


def model_of(base: dict | None = None, **changes) -> MoEGPT:
    """Return a model of seed 0."""
    torch.manual_seed(0)
    return MoEGPT(ModelConfig.from_mapping({**SHAPE, "mup_base": base, **changes}))


@pytest.mark.parametrize("experts", EXPERTS, ids=["mixture", "dense"])
def test_every_parameter_has_its_factors(experts):
    """By hand, from the table of Tensor Programs V and CompleteP's depth."""
    model = model_of(BASE, **experts)
    for name, _ in model.named_parameters():
        (wanted,) = [factors for end, factors in BY_HAND.items() if name.endswith(end)]
        assert scales_of(model.config, name) == pytest.approx(wanted), name
        assert scales_of(model_of(None, **experts).config, name) == (1, 1, 1)


@pytest.mark.parametrize("experts", EXPERTS, ids=["mixture", "dense"])
def test_initial_weights_are_the_standard_ones_times_their_factor(experts):
    """To the bit, because the draws are the same."""
    standard, scaled = model_of(None, **experts), model_of(BASE, **experts)
    for (name, old), (_, new) in zip(standard.named_parameters(), scaled.named_parameters(), strict=True):
        assert torch.equal(new, old * scales_of(scaled.config, name).std), name


def test_at_the_base_shape_all_is_standard_to_the_bit():
    """Weights and five steps."""
    own = {key: SHAPE[key] for key in BASE}
    models = [model_of(None), model_of(own)]
    for model in models:
        optimizer = build_optimizer(model, OptimizerConfig(name="adamw"))
        for _ in range(5):
            tokens = torch.arange(32).view(2, 16)
            loss = model.cross_entropy(tokens, tokens)[0].total
            loss.backward()
            update_weights(model, optimizer, 1e-3, 1.0, loss)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_parameter_is_in_one_group_with_its_rate_and_decay():
    """A step shrinks every matrix by lr times the decay, whatever its own rate is."""
    model = model_of(BASE)
    groups = build_optimizer(model, OptimizerConfig(name="adamw", weight_decay=0.1)).param_groups
    place = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(place) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = place[id(parameter)]
        assert group["scales"] == scales_of(model.config, name)
        decays = parameter.dim() > 1 and not name.startswith("embedding")
        assert group["weight_decay"] * group["scales"].lr == pytest.approx(0.1 * decays)


def test_adams_first_step_is_the_rate_of_the_group():
    """Adam moves every number by its learning rate at first."""
    model = model_of(BASE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", weight_decay=0.0, eps=1e-20))
    tokens = torch.arange(64).view(4, 16)
    loss = model.cross_entropy(tokens, tokens)[0].total
    loss.backward()
    update_weights(model, optimizer, 1e-3, 1e9, loss)
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * scales_of(model.config, name).lr, rel=0.02), name


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"model": {**SHAPE, "mup_base": BASE, "tie_embeddings": True}}, "tie_embeddings must be false with mup_base"),
        ({"model": {**SHAPE, "mup_base": BASE}, "optimizer": {"name": "muon"}}, "optimizer.name must be adamw"),
        ({"model": {**SHAPE, "mup_base": {"d_model": 16}}}, "model.mup_base"),
    ],
)
def test_what_has_no_scales_is_refused(values, cause):
    """With the keys."""
    with pytest.raises(ConfigError, match=cause):
        RunConfig.from_mapping(values)
