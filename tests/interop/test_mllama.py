"""A dense model that sees is written as Mllama, whatever its widths, and computes the same in transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_models import random_tokens, tiny_config
from tiny_seeing import SEE, give_eyes, noise
from torch.nn.functional import pad

from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.inference.generate import generate
from moe_gpt.inference.quantised import quantise
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.interop import hugging_face, mllama_folder
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.vision.cross_attention import last_seen
from moe_gpt.vision.shown import ShownPictures, encode

DENSE = {"n_experts": 1, "top_k": 1}


def seeing(see: object = SEE, **changes: object):
    """A dense model that sees, whose weights are large enough to be seen."""
    torch.manual_seed(0)
    return give_eyes(MoEGPT(tiny_config(**(DENSE | changes))), see)


@pytest.mark.parametrize(
    ("changes", "eyes"),
    [
        ({}, {"width": 32}),
        ({}, {}),
        ({"n_kv_heads": 2, "n_layers": 3}, {"width": 48, "every": 2}),
        ({"d_model": 30, "n_heads": 6, "head_dim": 4, "norm_eps": 1e-2}, {"width": 48}),
        ({"tie_embeddings": True, "attention_sharing": 2}, {"resampled_rows": 3}),
    ],
    ids=["as wide", "narrow features", "wide features", "odd widths", "shared weights"],
)
@torch.no_grad()
def test_transformers_computes_the_same(changes, eyes, tmp_path):
    """Logits of rows that see one of two pictures, within 1e-5; of text alone, too."""
    model = seeing(type(SEE)(**{**{f: getattr(SEE, f) for f in ("sources", "size", "width")}, **eyes}), **changes)
    mllama_folder.save(model, tmp_path / "x")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    assert type(theirs).__name__ == "MllamaForCausalLM"
    tokens, sees = random_tokens(2, 9), last_seen(torch.tensor([[True, *[False] * 3, True, *[False] * 4]] * 2))
    features = encode(model, [noise(seed) for seed in range(4)])
    seen = model.seen(features, [2, 2], sees)
    with model.looking(seen):
        ours = model(tokens).logits
    states = pad(seen.features, (0, theirs.config.get_text_config().hidden_size - features.shape[-1]))
    mask = torch.zeros(seen.visible.shape).masked_fill(~seen.visible, torch.finfo(torch.float32).min)
    right = theirs(tokens, cross_attention_states=states, cross_attention_mask=mask, use_cache=False).logits
    assert (ours - model(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(right, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(tokens, use_cache=False).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_transformers_generates_the_same(tmp_path):
    """As the model card says: with a mask, without which rows are causal, and without a cache. Greedy."""
    model = seeing()
    mllama_folder.save(model, tmp_path / "x")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    prompt, features = random_tokens(1, 5), encode(model, [noise(1)])
    beside = ShownPictures(features, [0], "x")
    ours = list(generate(model, prompt[0].tolist(), 12, SamplingConfig(temperature=0), beside=beside))
    states = pad(features, (0, 32 - features.shape[-1]))
    given = {"cross_attention_states": states, "cross_attention_mask": torch.zeros(1, 1, 1, states.shape[1])}
    got = theirs.generate(prompt, **given, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None)
    assert got[0, 5:].tolist() == ours
    blind = list(generate(model, prompt[0].tolist(), 12, SamplingConfig(temperature=0)))
    assert ours != blind


def test_the_folder_has_a_tokenizer_and_every_weight_once(tmp_path):
    """Ids are those of the tokenizer; no tensor of the text model or of cross-attention is left out."""
    tokenizer = train_tokenizer(["the quick brown fox " * 20], 300)
    model = seeing(vocab_size=tokenizer.vocab_size)
    mllama_folder.save(model, tmp_path / "x", tokenizer, torch.bfloat16)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert found("the quick")["input_ids"] == tokenizer.encode("the quick")
    values = json.loads((tmp_path / "x" / "config.json").read_text())
    assert values["text_config"]["eos_token_id"] == tokenizer.end_of_text_id
    own = {name: torch.zeros_like(x) for name, x in model.state_dict().items() if not name.startswith("encoder.")}
    for part, _ in mllama_folder.tensors_of(mllama_folder.Layout(model.config, 16, 1)).values():
        part.of(own[part.name]).add_(1)
    assert all(torch.equal(x, torch.ones_like(x)) for x in own.values())


def test_what_mllama_cannot_be_is_refused(tmp_path):
    """A mixture, quantised weights; and a folder of Llama or Mixtral would lose the eyes."""
    with pytest.raises(InputError, match=r"the model is a mixture that sees.* saved in the format of moe_gpt"):
        mllama_folder.save(seeing(n_experts=4, top_k=2), tmp_path / "x")
    with pytest.raises(InputError, match="no place for the encoder"):
        hugging_face.save(seeing(), tmp_path / "x")
    model = seeing()
    quantise(model, "int8")
    with pytest.raises(InputError, match="int8 already"):
        mllama_folder.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
