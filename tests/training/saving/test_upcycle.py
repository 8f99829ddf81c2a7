"""A dense model's weights in a mixture of experts."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_tokens, routers_of, tiny_config, tiny_model, training_loss

from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.saving.upcycle import starts_as_same_function, upcycle

MIXTURES = [
    {},
    {"top_k": 3},
    {"top_k": 4, "normalize_topk": False},
    {"n_experts": 7, "balance": "bias"},
]


def upcycled(dense: MoEGPT, **changes: object) -> MoEGPT:
    mixture = tiny_model(seed=1, **(dict(tie_embeddings=dense.config.tie_embeddings) | changes))
    tensors = upcycle(dict(dense.named_parameters()), mixture.config)
    own = dict(mixture.named_parameters())
    assert own.keys() - tensors.keys() == {f"blocks.{i}.feed_forward.router.weight" for i in range(2)}
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return mixture


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("changes", MIXTURES, ids=str)
@torch.no_grad()
def test_mixture_starts_as_the_dense_function(changes, tie_embeddings):
    """Whatever the routers choose, the logits are the dense model's, up to rounding."""
    dense = tiny_model(n_experts=1, top_k=1, tie_embeddings=tie_embeddings)
    mixture = upcycled(dense, **changes)
    assert starts_as_same_function(mixture.config)
    tokens = random_tokens(3, 20)
    torch.testing.assert_close(mixture.eval()(tokens).logits, dense.eval()(tokens).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_that_do_not_sum_to_one_change_the_function():
    """So such a mixture is refused where runs start."""
    dense = tiny_model(n_experts=1, top_k=1)
    mixture = upcycled(dense, normalize_topk=False)
    assert not starts_as_same_function(mixture.config)
    tokens = random_tokens(3, 20)
    assert (mixture(tokens).logits - dense(tokens).logits).abs().max() > 0.1


def test_experts_come_apart_in_training():
    """Each sees other tokens, so equal weights get different gradients, and the routers get one too."""
    mixture = upcycled(tiny_model(n_experts=1, top_k=1))
    tokens = random_tokens(4, 20)
    training_loss(mixture(tokens[:, :-1]), tokens[:, 1:], mixture).loss.backward()
    gradient = mixture.blocks[0].feed_forward.experts.gate_up.grad
    assert not torch.allclose(gradient[0], gradient[1])
    assert all(router.weight.grad.abs().max() > 0 for router in routers_of(mixture))


def test_experts_do_not_share_memory():
    """Copied into a model, each expert has weights of its own."""
    config = tiny_config()
    tensors = upcycle(dict(tiny_model(n_experts=1, top_k=1).named_parameters()), config)
    assert tensors["blocks.0.feed_forward.experts.gate_up"].shape == (4, 32, 32)
    mixture = upcycled(tiny_model(n_experts=1, top_k=1))
    with torch.no_grad():
        mixture.blocks[0].feed_forward.experts.down[0].zero_()
    assert mixture.blocks[0].feed_forward.experts.down[1].abs().max() > 0
