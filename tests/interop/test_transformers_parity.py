"""Agreement with transformers' Mixtral and Llama, an implementation that shares nothing with ours.

Tolerances, all in float32: logits and router logits may differ by 1e-4, gradients by 1e-4 of a tensor's largest
entry. Both sides add the same products in another order (our projections are fused, our experts grouped, our combine
accumulates in float32), which on these sizes costs 1e-6 to 1e-5; anything that is not rounding (a wrong expert, scale,
mask or angle) changes these logits, which reach 4, by more than 0.01.
"""

from __future__ import annotations

import importlib
import json
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    VOCAB_SIZE,
    random_tokens,
    routers_of,
    run_and_record_choices,
    tiny_model,
    training_loss,
)
from torch import Tensor, nn

from moe_gpt.data.tokenizer import END_OF_TEXT, train_tokenizer
from moe_gpt.files import tensors as tensor_files
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.generate import generate
from moe_gpt.inference.request import Request
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.interop import hugging_face
from moe_gpt.interop.mixtral_layout import tensor_table
from moe_gpt.model.losses import cross_entropy
from moe_gpt.model.transformer import MoEGPT


class _Transformers:
    """The package, imported at first use."""

    def __getattr__(self, name: str):
        package = importlib.import_module("transformers")
        package.utils.logging.disable_progress_bar()
        return getattr(package, name)


transformers = _Transformers()


def their_balancing_loss():
    """Return the function that Mixtral's own code has for it."""
    return importlib.import_module("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func


SHAPES: dict[str, dict] = {
    "multi_query": {},
    "grouped_query": {"n_kv_heads": 2},
    "multi_head": {"n_kv_heads": 4},
    "wide_heads": {"head_dim": 12},
    "tied": {"tie_embeddings": True},
    "top_3": {"top_k": 3, "n_experts": 5},
    "every_expert": {"top_k": 4},
    "every_expert_not_rescaled": {"top_k": 4, "normalize_topk": False},
    "long_rope": {"rope_theta": 1e6},
    "large_eps": {"norm_eps": 1e-2},
    "odd_sizes": {"d_model": 30, "d_ff": 17, "n_experts": 7, "n_heads": 3, "head_dim": 10, "n_layers": 3},
    "shared_attention": {"attention_sharing": 2},
    "noise_and_capacity_in_training": {"router_noise": 0.3, "capacity_factor": 1.0},
    "unmoved_balancing_bias": {"balance": "bias"},
    "dense": {"n_experts": 1, "top_k": 1},
    "dense_grouped_tied": {"n_experts": 1, "top_k": 1, "n_kv_heads": 2, "tie_embeddings": True, "head_dim": 12},
}
MIXTURES = [name for name, changes in SHAPES.items() if changes.get("n_experts") != 1]
TOLERANCE = 1e-4


@cache
def pair(shape: str) -> tuple[MoEGPT, nn.Module]:
    """Return a model of ours and what transformers loads from its export."""
    ours = tiny_model(max_seq_len=96, **SHAPES[shape]).eval()
    for router in routers_of(ours):
        if router.expert_bias is not None:
            router.expert_bias.zero_()
    folder = Path(mkdtemp()) / "exported"
    hugging_face.save(ours, folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    tokens = random_tokens(len(lengths), max(lengths))
    return tokens, torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_agree(shape):
    """For every shape, and they are large enough to notice."""
    ours, theirs = pair(shape)
    tokens = random_tokens(3, 64)
    logits = ours(tokens).logits
    assert logits.abs().max() > 1
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", MIXTURES)
@torch.no_grad()
def test_routers_agree_layer_by_layer(shape):
    """Router logits, the experts chosen, and the balancing loss, which is top_k times ours."""
    ours, theirs = pair(shape)
    tokens = random_tokens(3, 32)
    logits: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda _m, _i, out: logits.append(out.router_logits)) for r in routers_of(ours)]
    output, chosen = run_and_record_choices(ours, tokens)
    for hook in hooks:
        hook.remove()
    theirs_per_layer = theirs(tokens, output_router_logits=True).router_logits
    top_k, n_experts = ours.config.top_k, ours.config.n_experts
    assert len(theirs_per_layer) == ours.config.n_layers
    for layer, their_logits in enumerate(theirs_per_layer):
        torch.testing.assert_close(their_logits, logits[layer], rtol=0, atol=TOLERANCE)
        their_choice = their_logits.softmax(-1).topk(top_k).indices
        assert torch.equal(their_choice.sort().values, chosen[layer].flatten(0, 1).sort().values)
        their_loss = their_balancing_loss()((their_logits,), n_experts, top_k)
        torch.testing.assert_close(their_loss, top_k * output.router_stats.load_balancing_loss[layer])


@torch.no_grad()
def test_balancing_loss_agrees_where_there_is_padding():
    """Padding counts on neither side."""
    ours, theirs = pair("top_3")
    tokens, valid = left_padded([20, 7, 12])
    stats = ours(tokens, valid_mask=valid).router_stats
    their_layers = theirs(tokens, attention_mask=valid.long(), output_router_logits=True).router_logits
    for layer, logits in enumerate(their_layers):
        their_loss = their_balancing_loss()((logits,), 5, 3, attention_mask=valid.long())
        torch.testing.assert_close(their_loss, 3 * stats.load_balancing_loss[layer])


def test_exported_weight_of_the_balancing_loss_means_ours_for_one_layer():
    """With one layer, transformers' own total loss is ours."""
    ours = tiny_model(n_layers=1)
    folder = Path(mkdtemp()) / "exported"
    hugging_face.save(ours, folder, load_balancing_loss_weight=0.5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = random_tokens(2, 17)
    their_loss = theirs(tokens, labels=tokens, output_router_logits=True).loss
    output = ours(tokens[:, :-1])
    ce = cross_entropy(output.logits, tokens[:, 1:])
    # theirs counts the last position, which has no target, in the balancing loss
    balancing = ours(tokens).router_stats.load_balancing_loss.mean()
    torch.testing.assert_close(their_loss, ce.total / ce.n_valid + 0.5 * balancing)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_and_every_gradient_agree(shape):
    """The gradient of each of our tensors is put together from theirs; none is left over on either side."""
    ours, theirs = pair(shape)
    tokens = random_tokens(2, 33)
    for model in (ours, theirs):
        model.zero_grad()
    ce = cross_entropy(ours(tokens[:, :-1]).logits, tokens[:, 1:])
    loss = ce.total / ce.n_valid
    loss.backward()
    their_loss = theirs(tokens, labels=tokens).loss
    their_loss.backward()
    torch.testing.assert_close(their_loss, loss, rtol=0, atol=1e-5)
    their_gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    is_fused = any(name.endswith("gate_up_proj") for name in their_gradients)
    table = tensor_table(ours.config, "fused" if is_fused else "per_expert")
    assert table.keys() == their_gradients.keys()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    collected = {name: torch.zeros_like(grad) for name, grad in gradients.items()}
    for name, part in table.items():  # layers that share a tensor add up
        part.of(collected[part.name]).add_(their_gradients[name])
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(collected[name], gradient, rtol=0, atol=TOLERANCE * scale, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_generation_with_cache_agrees(shape):
    """24 tokens after prompts of three lengths, which transformers pads on the left.

    ``generate`` runs them one by one, the engine together in one batch without padding.
    """
    ours, theirs = pair(shape)
    tokens, valid = left_padded([9, 3, 6])
    made = theirs.generate(
        tokens,
        attention_mask=valid.long(),
        max_new_tokens=24,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=VOCAB_SIZE + 1,  # never
    )
    greedy, theirs_by_row = SamplingConfig(temperature=0), made[:, tokens.shape[1] :].tolist()
    prompts = [prompt[is_valid].tolist() for prompt, is_valid in zip(tokens, valid, strict=True)]
    assert [list(generate(ours, prompt, 24, greedy)) for prompt in prompts] == theirs_by_row
    engine = Engine(ours, n_rows=3)
    ids = [engine.add(Request(prompt=prompt, max_new_tokens=24, sampling=greedy)) for prompt in prompts]
    events = list(engine.run())
    assert [[event.token for event in events if event.request_id == each] for each in ids] == theirs_by_row


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_left_padded_batches_agree(shape):
    """At every position that is not padding."""
    ours, theirs = pair(shape)
    tokens, valid = left_padded([20, 7, 12])
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)  # as transformers' generate gives them
    their_logits = theirs(tokens, attention_mask=valid.long(), position_ids=positions).logits
    logits = ours(tokens, valid_mask=valid).logits
    torch.testing.assert_close(their_logits[valid], logits[valid], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["multi_query", "top_3", "tied", "dense"])
def test_training_agrees(shape):
    """20 steps of AdamW from the same weights on the same batches give the same losses."""
    ours = tiny_model(max_seq_len=96, **SHAPES[shape])
    folder = Path(mkdtemp()) / "exported"
    hugging_face.save(ours, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1) for m in (ours.train(), theirs)]
    losses: list[tuple[float, float]] = []
    for step in range(20):
        tokens = random_tokens(4, 33, seed=step % 4)
        ce = cross_entropy(ours(tokens[:, :-1]).logits, tokens[:, 1:])
        pair_of_losses = (ce.total / ce.n_valid, theirs(tokens, labels=tokens).loss)
        for loss, optimizer in zip(pair_of_losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((pair_of_losses[0].item(), pair_of_losses[1].item()))
    assert losses[-1][0] < losses[0][0] - 0.5  # it learned
    assert max(abs(mine - other) for mine, other in losses) < 1e-4


CONFIGS: dict[str, tuple] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 12}),
    "mixtral_tied": ("MixtralConfig", {"num_local_experts": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral_window_as_long_as_the_context": ("MistralConfig", {"sliding_window": 96}),
    "llama": ("LlamaConfig", {}),
    "llama_grouped": ("LlamaConfig", {"num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-3}),
}
IS_FUSED_IN_MEMORY = int(metadata.version("transformers").split(".")[0]) >= 5
SAVED_FORMS = [{}, {"save_original_format": False}] if IS_FUSED_IN_MEMORY else [{}]


@pytest.mark.parametrize("saved_as", SAVED_FORMS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_their_models_load_here(name, saved_as, tmp_path):
    """Models that transformers made and saved, in each form it saves experts in."""
    class_name, changes = CONFIGS[name]
    small = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 96}
    config = getattr(transformers, class_name)(**(small | {"initializer_range": 0.3} | changes))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path, **saved_as)
    ours = hugging_face.load(tmp_path)
    tokens = random_tokens(2, 40)
    logits = ours(tokens).logits
    assert logits.abs().max() > 1
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_loaded_model_trains_on(tmp_path):
    """What was loaded is an ordinary model: it runs forward and backward in training mode."""
    ours, _ = pair("multi_query")
    hugging_face.save(ours, tmp_path / "x")
    model = hugging_face.load(tmp_path / "x").train()
    tokens = random_tokens(2, 17)
    with torch.enable_grad():
        training_loss(model(tokens[:, :-1]), tokens[:, 1:], model).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_bfloat16_export_rounds_once(tmp_path):
    """The folder is opened in bfloat16, with our weights rounded to it."""
    ours, _ = pair("multi_query")
    hugging_face.save(ours, tmp_path / "x", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    again = hugging_face.load(tmp_path / "x")
    for (name, weight), loaded in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight.bfloat16().float(), loaded), name


@torch.no_grad()
def test_sharded_export_is_read_by_both(tmp_path, monkeypatch):
    """Several files and an index."""
    ours, theirs = pair("multi_query")
    small = partial(tensor_files.write_sharded, max_file_bytes=20_000)
    monkeypatch.setattr(hugging_face, "write_sharded", small)
    hugging_face.save(ours, tmp_path / "x")
    assert len(list((tmp_path / "x").glob("model-0000*.safetensors"))) > 2
    tokens = random_tokens(2, 20)
    logits = ours(tokens).logits
    assert torch.equal(hugging_face.load(tmp_path / "x")(tokens).logits, logits)
    sharded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert torch.equal(sharded(tokens).logits, theirs(tokens).logits)


@cache
def tokenizers():
    """Return our tokenizer and the exported one."""
    words = "the quick brown fox é🚀 def f(self):\n    return None\n\n\tx = 'ab' + \"12 34\"  # 你好 "
    ours = train_tokenizer([words * 50], 400)
    folder = Path(mkdtemp()) / "exported"
    hugging_face.save(tiny_model(vocab_size=ours.vocab_size), folder, ours)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


CODE = st.sampled_from(
    ["def f(x):", "    ", "\t", "\n", "\r\n", " ", "  ", "the", "quick", "'s", "#!", "<|", "|>", "é", "🚀", "\u0301"]
)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(CODE).map("".join))
def test_tokenizers_agree(text):
    """The same ids both ways; what spells end-of-text is the documented exception."""
    ours, theirs = tokenizers()
    if END_OF_TEXT in text:
        return
    ids = ours.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == text


def test_exported_tokenizer_is_ready_to_use():
    """Special tokens, padding on the left, and exactly the inputs that generate() takes."""
    ours, theirs = tokenizers()
    assert theirs.eos_token == theirs.bos_token == theirs.pad_token == END_OF_TEXT
    assert theirs.eos_token_id == ours.end_of_text_id
    batch = theirs(["the quick", "the"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist()[1][0] == 0
    assert theirs(f"the{END_OF_TEXT}").input_ids[-1] == ours.end_of_text_id  # unlike in training
    assert theirs.model_max_length == 32


def test_generation_stops_at_end_of_text(tmp_path):
    """generate() knows end-of-text and padding from generation_config.json."""
    ours, _ = tokenizers()
    hugging_face.save(tiny_model(vocab_size=ours.vocab_size), tmp_path / "x", ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    end = ours.end_of_text_id
    assert theirs.generation_config.eos_token_id == theirs.generation_config.pad_token_id == end
    assert json.loads((tmp_path / "x" / "config.json").read_text())["bos_token_id"] == end


def test_special_tokens_survive(tmp_path):
    """Padding is padding, not end-of-text, where the tokenizer has it; the others are tokens as well."""
    special = ("<|padding|>", "<|user|>")
    ours = train_tokenizer(["the quick brown fox " * 20], 300, special_tokens=special)
    hugging_face.save(tiny_model(vocab_size=ours.vocab_size), tmp_path / "x", ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert (theirs.pad_token, theirs.eos_token) == ("<|padding|>", END_OF_TEXT)
    assert theirs("<|user|>the").input_ids[0] == ours.special_id("<|user|>")
    assert hugging_face.load_tokenizer(tmp_path / "x").special_tokens() == ours.special_tokens()
