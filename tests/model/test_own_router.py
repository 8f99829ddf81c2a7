"""Routers of one's own: any number of experts a token, and a clear word where the routing cannot be used."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_tokens, tiny_config
from torch.testing import assert_close

from moe_gpt.model.cache import KVCache
from moe_gpt.model.router import Router, Routing
from moe_gpt.model.transformer import MoEGPT


def router_of(k: int) -> type[Router]:
    """Return a router that sends each token to its ``k`` best experts, whatever ``top_k`` says."""

    class BestK(Router):
        def forward(self, x: torch.Tensor) -> Routing:
            logits = self.logits(x)
            probs = logits.softmax(dim=-1)
            weights, chosen = probs.topk(k, dim=-1)
            return Routing(chosen, weights, logits, probs)

    return BestK


def own_model(make_router, **changes: object) -> MoEGPT:
    torch.manual_seed(0)
    return MoEGPT(tiny_config(n_experts=6, **changes), make_router)


@pytest.mark.parametrize("k", range(1, 7))
def test_decoding_equals_the_forward_pass_for_every_k(k):
    """A router may return any K from 1 to E: the cache, single tokens and left padding give the same logits."""
    model = own_model(router_of(k)).eval()
    tokens = random_tokens(2, 9)
    with torch.inference_mode():
        expected = model(tokens).logits
        cache = KVCache(model.config, 2, 9, torch.device("cpu"), torch.float32)
        steps = [model.next_token_logits(part, cache) for part in (tokens[:, :5], *tokens[:, 5:].split(1, dim=1))]
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), tokens], dim=1)
        is_valid = torch.arange(12).expand(2, 12) >= 3
        shifted = model(padded, valid_mask=is_valid).logits[:, 3:]
    assert_close(torch.stack(steps, dim=1), expected[:, 4:], atol=1e-5, rtol=1e-4)
    assert_close(shifted, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", range(1, 7))
def test_statistics_count_every_choice(k):
    """In training each of N tokens has K assignments in every layer, and gradients reach every expert's weights."""
    model = own_model(router_of(k)).train()
    output = model(random_tokens(2, 9))
    assert output.router_stats.tokens_per_expert.sum(dim=1).tolist() == [18 * k] * 2
    assert output.router_stats.dropped_assignments.tolist() == [0, 0]
    output.logits.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("k", range(1, 7))
def test_capacity_is_a_share_of_the_choices_that_are_made(k):
    """With capacity factor 0.5 every expert keeps at most ceil(N K / 2 E) assignments, padding takes none."""
    model = own_model(router_of(k), capacity_factor=0.5).train()
    stats = model(random_tokens(2, 9)).router_stats
    most = -(-18 * k // 12)
    kept = stats.tokens_per_expert.clamp(max=most).sum(dim=1)
    assert (stats.tokens_per_expert.sum(dim=1) - stats.dropped_assignments).tolist() == kept.tolist()


def test_layers_may_differ_in_k():
    """Statistics of layers whose routers choose different numbers of experts are those of each layer alone."""
    numbers = iter([1, 3])
    model = own_model(lambda config: router_of(next(numbers))(config))
    stats = model(random_tokens(2, 9)).router_stats
    assert stats.tokens_per_expert.sum(dim=1).tolist() == [18, 54]
    assert stats.load_balancing_loss.shape == stats.router_z_loss.shape == (2,)


def spoiled(**changes) -> type[Router]:
    """Return a router whose routing has some parts replaced by functions of them."""

    class Spoiled(Router):
        def forward(self, x: torch.Tensor) -> Routing:
            routing = super().forward(x)
            return routing._replace(**{name: change(getattr(routing, name)) for name, change in changes.items()})

    return Spoiled


class ReturnsTuple(Router):
    """Returns the four parts, but no Routing."""

    def forward(self, x: torch.Tensor):
        """Return a plain tuple."""
        return tuple(super().forward(x))


@pytest.mark.parametrize(
    ("make_router", "wanted"),
    [
        (ReturnsTuple, "Routing of four tensors, got tuple"),
        (spoiled(expert_indices=torch.Tensor.int), "int64, got torch.int32"),
        (spoiled(expert_indices=lambda chosen: chosen + 5), "from 0 to 5"),
        (spoiled(expert_indices=lambda chosen: chosen - 9), "from 0 to 5, got -"),
        (spoiled(expert_indices=lambda chosen: chosen[:, :0], expert_weights=lambda w: w[:, :0]), r"\(18, 0\)"),
        (spoiled(expert_weights=lambda weights: weights[:, :1]), r"\(18, 1\)"),
        (spoiled(expert_indices=torch.Tensor.flatten), r"\(36,\)"),
        (spoiled(router_probs=lambda probs: probs[:, :4]), r"\(18, 4\)"),
        (spoiled(router_logits=lambda logits: logits[:5]), r"\(5, 6\)"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_malformed_routing_is_refused_with_the_word_router(make_router, wanted, training):
    """What a router returns is checked before experts see it; the error says what is right."""
    model = own_model(make_router).train(training)
    with pytest.raises(ValueError, match=f"^a router must return .*{wanted}"):
        model(random_tokens(2, 9))


def test_repr_shows_sizes():
    """A printed model shows the shape of every parameter."""
    text = repr(MoEGPT(tiny_config()))
    for shape in ("Router(weight (4, 32))", "gate_up (4, 32, 32), down (4, 32, 16)", "RMSNorm(weight (32,))"):
        assert shape in text
