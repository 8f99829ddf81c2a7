"""Parameters and FLOPs: by hand, as the model itself has them, and of the shape that GPT-4 was reported to have."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_gpt import ops
from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.errors import ConfigError
from moe_gpt.measure import parameters
from moe_gpt.measure.flops import FlopsPerToken, count_flops
from moe_gpt.measure.parameters import ParameterCounts, count_parameters, model_of
from moe_gpt.measure.shapes import shapes_only
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.plan.parameters import parameters_section

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


@pytest.mark.parametrize("changes", [{}, {"n_layers": 6, "attention_sharing": 3}, {"n_experts": 1, "top_k": 1}])
def test_count_parameters_agrees_with_the_model(changes):
    """The total and the attention are what a real model's parameters add up to, although one layer is built."""
    config = change(**changes)
    sizes = {name: parameter.numel() for name, parameter in MoEGPT(config).named_parameters()}
    counts = count_parameters(config)
    assert counts.total == sum(sizes.values())
    assert counts.attention == sum(size for name, size in sizes.items() if ".attention." in name)


def test_the_time_of_counting_does_not_grow_with_layers(monkeypatch):
    """One layer is built, whatever their number."""
    built = []
    monkeypatch.setattr(parameters, "shapes_only", lambda config: built.append(config) or shapes_only(config))
    few, many = (count_parameters(change(n_layers=n)) for n in (1, 10_000))
    assert [config.n_layers for config in built] == [1, 1]
    assert many.total - few.total == 9_999 * (436 // 2 - 42)
    assert many.per_expert == 10_000 * few.per_expert


@pytest.mark.parametrize("n_layers", [10_001, 10**8, 2**63, 10**30])
def test_absurd_numbers_of_layers_are_refused(n_layers):
    """At once, before anything loops over them; so are the divisors in a message."""
    with pytest.raises(ConfigError, match=f"n_layers must be a whole number from 1 to 10,000, got {n_layers}"):
        change(n_layers=n_layers)
    with pytest.raises(ConfigError, match="choose one of 1, 2, 4, 5"):
        change(n_heads=10**18, n_kv_heads=3)


def test_count_parameters_of_the_reported_gpt4():
    """1.83e12 in all, 279e9 active, 55.8e9 of attention, 111e9 per expert, to 1 %, without memory for weights."""
    counts = count_parameters(GPT4)
    assert counts.total == pytest.approx(1.83e12, rel=0.01)
    assert counts.active == pytest.approx(279e9, rel=0.01)
    assert counts.attention == pytest.approx(55.8e9, rel=0.01)
    assert counts.per_expert == pytest.approx(111e9, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"n_experts": 1, "top_k": 1}, {"tie_embeddings": True}, {"balance": "bias"}])
def test_shapes_only_has_the_names_shapes_and_types_of_a_model(changes):
    """Leaving out the drawing of weights changes nothing else about a model, tied matrices included."""
    found, wanted = shapes_only(change(**changes)), MoEGPT(change(**changes))
    assert {n: (t.shape, t.dtype) for n, t in found.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in wanted.state_dict().items()
    }
    assert len(list(found.parameters())) == len(list(wanted.parameters()))
    assert all(parameter.is_meta for parameter in found.parameters())


@pytest.mark.slow
def test_counting_imports_no_compiler():
    """Drawing weights on meta would import torch's compiler, which takes seconds; counting does not."""
    code = """
import sys
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.config import ModelConfig
count_parameters(ModelConfig(vocab_size=10))
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_model_of_takes_the_tokenizers_vocabulary_where_the_model_has_none():
    """The vocabulary is the model's own where it is given, else the tokenizer's."""
    config = RunConfig()
    assert model_of(config).vocab_size == config.data.tokenizer.vocab_size
    own = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=77))
    assert model_of(own).vocab_size == 77


def test_count_flops_of_a_tiny_model_by_hand():
    """Two layers, 5 positions: 2·48 projections, 2·2·2·6 scores, 2·2·36 experts, 2·12 router; 2·40 for the output."""
    assert count_flops(TINY, 5) == FlopsPerToken(
        attention_projections=2 * 2 * 48,
        attention_scores=2 * 2 * 2 * 2 * 6,
        feed_forward=2 * 2 * 2 * 36,
        router=2 * 2 * 12,
        output=2 * 40,
    )
    assert count_flops(TINY, 5).backward == 2 * count_flops(TINY, 5).forward
    assert count_flops(TINY, 5, count_parameters(TINY)) == count_flops(TINY, 5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 2}, {"n_experts": 1, "top_k": 1}, {"attention_sharing": 2}, {"tie_embeddings": True}],
)
@pytest.mark.parametrize("seq_len", [2, 8, 33])
def test_count_flops_equals_torchs_counter(changes, seq_len):
    """Forward exactly, backward exactly twice that, where the counter's square of scores is 2 T / (T + 1) of our half.

    A position sees (T + 1) / 2 positions on average, itself included; matrix products compute all T.
    """
    config = change(max_seq_len=64, **changes)
    model, flops = MoEGPT(config), count_flops(config, seq_len)
    tokens = torch.randint(10, (3, seq_len), generator=torch.Generator().manual_seed(0))
    square = flops.attention_scores * 2 * seq_len // (seq_len + 1)
    expected = 3 * seq_len * (flops.forward - flops.attention_scores + square)
    with ops.using("plain"), FlopCounterMode(display=False) as forward:  # of products that the counter knows
        logits = model(tokens).logits
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * expected


def test_parameters_section_adds_up():
    """Attention, experts, routers, embedding and norms are all parameters there are; layers and ends, too."""
    for changes in ({}, {"tie_embeddings": True}, {"n_experts": 1, "top_k": 1}):
        section = parameters_section(change(**changes))
        parts = ("attention", "experts", "router", "embedding", "norms")
        assert sum(section[part] for part in parts) == section["total"]
        assert section["norms"] == 2 * 8 + 4
        assert 2 * section["per_layer"] + section["embedding"] + 4 == section["total"]


def test_parameters_section_dense_equivalents_are_real_models():
    """The dense models of the same active and the same total size have just these parameters."""
    section = parameters_section(TINY)
    assert section["dense_of_same_active"] == count_parameters(change(n_experts=1, top_k=1, d_ff=3 * 2)).total
    assert section["dense_of_same_total"] == count_parameters(change(n_experts=1, top_k=1, d_ff=3 * 3)).total


def test_parameters_section_of_the_reported_gpt4():
    """1.83e12, 16 experts of 111e9 and 55.8e9 of attention, an active sixth and a half, to 1 %."""
    section = parameters_section(GPT4)
    assert section["total"] == pytest.approx(1831e9, rel=0.01)
    assert section["experts"] == pytest.approx(16 * 111e9, rel=0.01)
    assert section["attention"] == pytest.approx(55.8e9, rel=0.01)
    assert section["per_layer"] == pytest.approx(1831e9 / 120, rel=0.01)
    assert section["active_fraction"] == pytest.approx(0.152, abs=0.001)
