"""Parameter counts: by hand for a tiny model, and of the shape that GPT-4 was reported to have."""

import dataclasses

import pytest

from moe_gpt.analysis.accounting import ParameterCounts, count_parameters
from moe_gpt.config import ModelConfig
from moe_gpt.model.transformer import MoEGPT

TINY = ModelConfig(
    vocab_size=10, n_layers=2, d_model=4, n_heads=2, n_kv_heads=1, head_dim=2, d_ff=3, n_experts=3, top_k=2
)
GPT4 = ModelConfig(
    vocab_size=100_000,
    n_layers=120,
    d_model=10_752,
    n_heads=168,
    n_kv_heads=1,
    head_dim=128,
    d_ff=28_672,
    n_experts=16,
    top_k=2,
    tie_embeddings=True,
)


def change(**changes: object) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def test_count_parameters_of_a_tiny_model_by_hand():
    """Each of two layers: attention 4·8 + 4·4, three experts of 3·4·3, router 3·4, norms 2·4; ends 2·40 and norm 4."""
    assert count_parameters(TINY) == ParameterCounts(
        total=2 * (48 + 3 * 36 + 12 + 8) + 80 + 4,
        active=2 * (48 + 2 * 36 + 12 + 8) + 80 + 4,
        attention=2 * 48,
        per_expert=2 * 36,
        router=2 * 12,
        embedding=80,
    )


@pytest.mark.parametrize(
    ("config", "total", "attention", "embedding"),
    [
        (change(attention_sharing=2), 436 - 48, 48, 80),
        (change(tie_embeddings=True), 436 - 40, 96, 40),
        (change(tie_embeddings=True, attention_sharing=2), 436 - 88, 48, 40),
        (change(n_kv_heads=2), 436 + 2 * 16, 128, 80),
        (change(balance="bias"), 436, 96, 80),  # a buffer is no parameter
    ],
)
def test_count_parameters_counts_shared_ones_once(config, total, attention, embedding):
    """Shared attention and tied embeddings count once; key-value heads and nothing else grow with n_kv_heads."""
    counts = count_parameters(config)
    assert (counts.total, counts.attention, counts.embedding) == (total, attention, embedding)
    assert counts.total - counts.active == 72


def test_count_parameters_of_a_dense_model_are_all_active():
    """One expert has no router, and every parameter is used for every token."""
    counts = count_parameters(change(n_experts=1, top_k=1))
    assert counts == ParameterCounts(total=268, active=268, attention=96, per_expert=72, router=0, embedding=80)


@pytest.mark.parametrize(("top_k", "active"), [(1, 436 - 144), (2, 436 - 72), (3, 436)])
def test_count_parameters_active_grows_with_top_k(top_k, active):
    """Active are all parameters but those of the experts that a token is not sent to."""
    assert count_parameters(change(top_k=top_k, normalize_topk=False)).active == active


def test_count_parameters_agrees_with_the_model():
    """The total is what a real model's parameters add up to."""
    model = MoEGPT(TINY)
    assert count_parameters(TINY).total == sum(parameter.numel() for parameter in model.parameters())


def test_count_parameters_of_the_reported_gpt4():
    """1.83e12 in all, 279e9 active, 55.8e9 of attention, 111e9 per expert, to 1 %, without memory for weights."""
    counts = count_parameters(GPT4)
    assert counts.total == pytest.approx(1.83e12, rel=0.01)
    assert counts.active == pytest.approx(279e9, rel=0.01)
    assert counts.attention == pytest.approx(55.8e9, rel=0.01)
    assert counts.per_expert == pytest.approx(111e9, rel=0.01)
