"""Cross-attention equals Mllama's and Idefics' where a token sees a picture, and changes nothing where it sees none."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import random_tokens, tiny_config, tiny_model
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from moe_gpt.config.yaml import load_run_config
from moe_gpt.measure.parameters import count_parameters, model_of
from moe_gpt.model.cache import KVCache
from moe_gpt.vision.cross_attention import CrossLayers, GatedCrossBlock, Seen, last_seen

FEATURES, MARKER = 32, 3
DENSE = {"n_experts": 1, "top_k": 1}


def opened(layers: torch.nn.Module) -> torch.nn.Module:
    """Cross-attention after some training: all weights random, the gates of both signs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("gate"):
                parameter.fill_(0.7 if "attention" in name else -0.4)
    return layers


def pictures(sees: list[list[int]], n_pictures: int = 2, rows: int = 5) -> Seen:
    """Random features of pictures, with two rows of padding behind them."""
    features = torch.randn(len(sees), n_pictures * rows + 2, FEATURES, generator=torch.Generator().manual_seed(2))
    numbers = [*(1 + row // rows for row in range(n_pictures * rows)), 0, 0]
    return Seen(features, torch.tensor([numbers] * len(sees)), torch.tensor(sees))


def to_mllama(block: GatedCrossBlock) -> dict[str, torch.Tensor]:
    """The weights of a layer by Mllama's names."""
    key, value = block.attention.kv.weight.chunk(2)
    gate, up = block.feed_forward.gate_up.weight.chunk(2)
    return {
        "input_layernorm.weight": block.attention_norm.weight,
        "post_attention_layernorm.weight": block.feed_forward_norm.weight,
        "cross_attn.q_proj.weight": block.attention.q.weight,
        "cross_attn.k_proj.weight": key,
        "cross_attn.v_proj.weight": value,
        "cross_attn.o_proj.weight": block.attention.out.weight,
        "cross_attn.q_norm.weight": block.attention.q_norm.weight,
        "cross_attn.k_norm.weight": block.attention.k_norm.weight,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": block.feed_forward.down.weight,
        "cross_attn_attn_gate": block.attention_gate,
        "cross_attn_mlp_gate": block.feed_forward_gate,
    }


def mllama_config(n_layers: int, **changes: object) -> transformers.MllamaTextConfig:
    """The text model of Llama 3.2 at our tiny size."""
    return transformers.MllamaTextConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=16,
        rms_norm_eps=tiny_config().norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": tiny_config().rope_theta},
        cross_attention_layers=list(range(0, n_layers, 2)),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **changes,
    )


def test_a_layer_is_mllamas_where_a_token_sees():
    """Multi-query attention with normalised queries and keys, SwiGLU, two gates."""
    block = opened(GatedCrossBlock(tiny_config(**DENSE), FEATURES))
    config = mllama_config(2)
    config._attn_implementation = "sdpa"
    theirs = MllamaCrossAttentionDecoderLayer(config, 0)
    theirs.load_state_dict(to_mllama(block))
    x, seen = torch.randn(2, 6, 32), pictures([[1, 1, 1, 2, 2, 2], [2, 2, 1, 1, 1, 1]])
    mask = torch.zeros(seen.visible.shape).masked_fill(~seen.visible, torch.finfo(torch.float32).min)
    right = theirs(x, seen.features, mask, None, None)
    right = right[0] if isinstance(right, tuple) else right
    torch.testing.assert_close(block(x, seen), right, atol=1e-5, rtol=1e-5)


def test_fused_attention_is_that_of_the_products():
    """As other devices than CPUs compute it: values and gradients, with tokens that see nothing, for which it is 0."""
    attention = opened(GatedCrossBlock(tiny_config(n_kv_heads=2, **DENSE), FEATURES)).attention
    seen, x = pictures([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]]), torch.randn(2, 6, 32)
    weight, found = torch.randn(2, 4, 6, attention.head_dim), []
    for attend in (attention.attend, lambda q, s: attention._fused(q, *attention.keys_and_values(s.features), s)):
        attention.zero_grad()
        mixed = attend(attention.queries(x), seen)
        assert not mixed.movedim(1, 2)[seen.sees == 0].any()
        (mixed * weight).sum().backward()
        found.append(
            [mixed, *(attention.get_parameter(f"{name}.weight").grad for name in ("q", "kv", "q_norm", "k_norm"))]
        )
    for products, fused in zip(*found, strict=True):
        assert products.any()
        torch.testing.assert_close(fused, products, atol=1e-5, rtol=1e-5)


def test_a_layer_is_that_of_idefics_where_a_token_sees():
    """The layer of Flamingo's open successor, with as many key-value heads as query heads."""
    block = opened(GatedCrossBlock(tiny_config(n_kv_heads=4, **DENSE), FEATURES))
    config = transformers.IdeficsConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=16,
        qk_layer_norms=True,
        alpha_type="float",
        rms_norm_eps=tiny_config().norm_eps,
        vision_config={"embed_dim": FEATURES},
    )
    config._attn_implementation = "sdpa"
    theirs = IdeficsGatedCrossAttentionLayer(config, 0).eval()
    names = {"cross_attn_attn_gate": "alpha_cross_attn", "cross_attn_mlp_gate": "alpha_dense"}
    names |= {f"cross_attn.{a}_norm.weight": f"cross_attn.{a}_layer_norm.weight" for a in "qk"}
    theirs.load_state_dict({names.get(name, name): weight for name, weight in to_mllama(block).items()})
    x, seen = torch.randn(2, 6, 32), pictures([[1, 1, 1, 2, 2, 2], [2, 2, 1, 1, 1, 1]])
    mask = torch.zeros(seen.visible.shape).masked_fill(~seen.visible, torch.finfo(torch.float32).min)
    gate = (seen.sees > 0).float()
    right = theirs(x, image_hidden_states=seen.features, image_attention_mask=mask, cross_attention_gate=gate)
    right = right[0] if isinstance(right, tuple) else right
    torch.testing.assert_close(block(x, seen), right, atol=1e-5, rtol=1e-5)


def mllama_of(model, cross: CrossLayers) -> transformers.MllamaForCausalLM:
    """The whole stack in transformers: cross-attention before each of our blocks."""
    theirs = transformers.MllamaForCausalLM(mllama_config(2 * len(model.blocks))).eval()
    embedding = torch.cat((model.embedding.weight, torch.zeros(8, 32)))  # they have eight tokens more, for pictures
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": model.final_norm.weight}
    state["lm_head.weight"] = model.output.weight
    for number, (block, layer) in enumerate(zip(model.blocks, cross.layers, strict=True)):
        state |= {f"model.layers.{2 * number}.{name}": weight for name, weight in to_mllama(layer).items()}
        here = f"model.layers.{2 * number + 1}"
        query, key, value = block.attention.qkv.weight.split([32, 8, 8])
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        state |= {
            f"{here}.input_layernorm.weight": block.attention_norm.weight,
            f"{here}.post_attention_layernorm.weight": block.feed_forward_norm.weight,
            f"{here}.self_attn.q_proj.weight": query,
            f"{here}.self_attn.k_proj.weight": key,
            f"{here}.self_attn.v_proj.weight": value,
            f"{here}.self_attn.o_proj.weight": block.attention.out.weight,
            f"{here}.mlp.gate_proj.weight": gate,
            f"{here}.mlp.up_proj.weight": up,
            f"{here}.mlp.down_proj.weight": block.feed_forward.down.weight,
        }
    theirs.load_state_dict(state)
    return theirs


@torch.no_grad()
def test_a_dense_model_that_sees_is_llama_3_2():
    """The logits of the complete stack, with a picture and without."""
    model = tiny_model(**DENSE).eval()
    cross = opened(CrossLayers(model, FEATURES))
    theirs = mllama_of(model, cross)
    tokens, seen = random_tokens(2, 7), pictures([[1] * 7, [1] * 7], n_pictures=1)
    with cross.looking(model, seen):
        ours = model(tokens).logits
    mask = torch.zeros(seen.visible.shape).masked_fill(~seen.visible, torch.finfo(torch.float32).min)
    right = theirs(tokens, cross_attention_states=seen.features, cross_attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tokens).logits, theirs(tokens, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, DENSE, {"attention_sharing": 2}, {"balance": "bias"}])
def test_text_alone_keeps_the_text_models_bits(changes):
    """After any training; hooks are gone afterwards, also when the block fails."""
    model = tiny_model(**changes).eval()
    cross, tokens = opened(CrossLayers(model, FEATURES)), random_tokens(2, 9)
    alone = model(tokens).logits
    with cross.looking(model, None):
        assert model(tokens).logits.equal(alone)
    seen = pictures([[1] * 9] * 2)
    with cross.looking(model, seen):
        assert not torch.allclose(model(tokens).logits, alone, atol=0.1)
    with pytest.raises(ZeroDivisionError), cross.looking(model, seen):
        raise ZeroDivisionError
    assert model(tokens).logits.equal(alone)


@torch.no_grad()
def test_rows_that_see_nothing_keep_their_numbers():
    """A layer keeps their bits. In a whole model experts share batches with other rows, so the last bits may differ."""
    block = opened(GatedCrossBlock(tiny_config(), FEATURES))
    x, seen = torch.randn(2, 6, 32), pictures([[0, 0, 1, 1, 2, 2], [0] * 6])
    new, blind = block(x, seen), seen.sees == 0
    assert new[blind].equal(x[blind])
    assert not torch.isclose(new[~blind], x[~blind]).all(1).any()
    model = tiny_model().eval()
    cross, tokens = opened(CrossLayers(model, FEATURES)), random_tokens(2, 6)
    alone = model(tokens).logits
    with cross.looking(model, seen):
        torch.testing.assert_close(model(tokens).logits[blind], alone[blind], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_sees_the_last_picture_before_it():
    """Another second picture changes the tokens after it, and none before it."""
    model = tiny_model().eval()
    cross = opened(CrossLayers(model, FEATURES))
    tokens = random_tokens(1, 10).masked_fill_(random_tokens(1, 10) == MARKER, 0)
    tokens[0, [1, 5]] = MARKER
    sees = last_seen(tokens == MARKER)
    assert sees.tolist() == [[0, 1, 1, 1, 1, 2, 2, 2, 2, 2]]
    seen = pictures(sees.tolist())
    other = seen._replace(features=torch.where(seen.picture[..., None] == 2, -seen.features, seen.features))
    with cross.looking(model, seen):
        first = model(tokens).logits
    with cross.looking(model, other):
        second = model(tokens).logits
    torch.testing.assert_close(first[:, :5], second[:, :5], atol=1e-5, rtol=1e-5)
    assert (first[:, 5:] - second[:, 5:]).abs().amax(2).min() > 0.1


def test_closed_gates_change_nothing_and_learn():
    """At the start the model is the text model, bit for bit, and only the gates have gradients that are not zero."""
    model = tiny_model()
    cross, tokens = CrossLayers(model, FEATURES), random_tokens(2, 8)
    seen = pictures([[0, 0, 1, 1, 1, 2, 2, 2], [0] * 8])
    with cross.looking(model, seen):
        logits = model(tokens).logits
    assert logits.equal(model(tokens).logits)
    logits.square().mean().backward()
    for name, parameter in cross.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert bool(parameter.grad.any()) == name.endswith("gate"), name


@torch.no_grad()
def test_decoding_token_by_token_gives_the_same_logits():
    """With the text's cache; each step gives the picture that its token sees."""
    model = tiny_model().eval()
    cross, tokens = opened(CrossLayers(model, FEATURES)), random_tokens(1, 8)
    seen = pictures([[0, 0, 1, 1, 1, 2, 2, 2]])
    with cross.looking(model, seen):
        whole = model(tokens).logits
    cache = KVCache(model.config, 1, 8, torch.device("cpu"), torch.float32)
    for at in range(8):
        with cross.looking(model, seen._replace(sees=seen.sees[:, at : at + 1])):
            step = model(tokens[:, at : at + 1], cache=cache).logits
        torch.testing.assert_close(step[:, 0], whole[:, at], atol=1e-5, rtol=1e-5)


def test_sizes_of_the_reported_model_are_those_of_the_page():
    """See "At the reported size" of docs/see-and-hear.md."""
    config = model_of(load_run_config("gpt4.yaml"))
    with torch.device("meta"):
        layer = GatedCrossBlock(config, 1408)
    counts, n_layers = count_parameters(config), config.n_layers // 8
    size = sum(parameter.numel() for parameter in layer.parameters())
    assert [round(size / 1e9, 2), round(n_layers * size / 1e9, 1)] == [1.39, 20.8]
    assert round(100 * n_layers * size / counts.total, 1) == 1.1
    assert [round(n * counts.active * 2e12 / 1e24, 1) for n in (4, 6)] == [2.2, 3.3]
    assert [round(100 * n * 2 / (6 * 13)) for n in (4, 6)] == [10, 15]
    keys_and_values = 2 * config.n_kv_heads * config.head_dim * 2
    assert round(n_layers * 1024 * keys_and_values / 1e6, 1) == 7.9
    assert [config.n_layers * keys_and_values // 1000, n_layers * 1024 // config.n_layers] == [61, 128]
