"""Folders written and read without transformers: what is in them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, VOCAB_SIZE, random_tokens, tiny_config, tiny_model

from moe_gpt.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.interop import hugging_face
from moe_gpt.interop.mixtral_layout import from_hugging_face, tensor_table, to_hugging_face
from moe_gpt.model.transformer import MoEGPT

EXPORTABLE = [n for n, c in VARIANTS.items() if c.get("balance") != "bias" and c.get("normalize_topk", True)]


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny Mixtral with a tokenizer."""
    tokenizer = train_tokenizer(["the quick brown fox " * 20], 300)
    hugging_face.save(tiny_model(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("variant", EXPORTABLE)
def test_saved_and_loaded_again_is_the_same_function(variant, tmp_path):
    """To the bit, for every setting that the format has."""
    model = tiny_model(**VARIANTS[variant]).eval()
    hugging_face.save(model, tmp_path / "x")
    tokens = random_tokens(2, 9)
    assert torch.equal(hugging_face.load(tmp_path / "x")(tokens).logits, model(tokens).logits)


def test_released_names_and_shapes(folder):
    """The per-expert form: w1 is the gate, w2 the way down, w3 the way up."""
    tensors = load_file(folder / "model.safetensors")
    model = hugging_face.load(folder)
    experts = model.blocks[1].feed_forward.experts
    names = "model.layers.1.block_sparse_moe.experts.3."
    assert torch.equal(tensors[names + "w1.weight"], experts.gate_up[3, :16])
    assert torch.equal(tensors[names + "w3.weight"], experts.gate_up[3, 16:])
    assert torch.equal(tensors[names + "w2.weight"], experts.down[3])
    assert torch.equal(tensors["model.layers.0.self_attn.k_proj.weight"], model.blocks[0].attention.qkv.weight[32:40])


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("changes", [{}, {"n_experts": 1, "top_k": 1}, {"n_kv_heads": 2, "head_dim": 6}], ids=str)
def test_table_covers_every_weight_exactly_once(changes, layout):
    """Writing ones through every slice leaves exactly ones everywhere."""
    model = MoEGPT(tiny_config(**changes))
    own = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in tensor_table(model.config, layout).values():
        part.of(own[part.name]).add_(1)
    for name, written in own.items():
        assert torch.equal(written, torch.ones_like(written)), name


def test_fused_experts_load(tmp_path):
    """The form that transformers 5 keeps in memory."""
    model = tiny_model().eval()
    hugging_face.save(model, tmp_path / "x")
    own = dict(model.named_parameters())
    fused = {
        name: part.of(own[part.name]).detach().clone() for name, part in tensor_table(model.config, "fused").items()
    }
    save_file(fused, tmp_path / "x" / "model.safetensors")
    tokens = random_tokens(2, 9)
    assert torch.equal(hugging_face.load(tmp_path / "x")(tokens).logits, model(tokens).logits)


def test_equal_models_give_equal_files(tmp_path):
    """Exporting the same model twice writes the same bytes."""
    for name in ("a", "b"):
        hugging_face.save(tiny_model(), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_config_says_rope_theta_for_old_and_new_versions(folder):
    """Transformers 4 reads one place, 5 the other."""
    values = json.loads((folder / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 10_000.0


def test_balancing_loss_weight_is_divided_by_top_k():
    """Their loss is top_k times ours; without a balancing loss the weight is 0."""
    assert to_hugging_face(tiny_config(top_k=4), 0.02)["router_aux_loss_coef"] == pytest.approx(0.005)
    assert to_hugging_face(tiny_config(balance="none"), 0.02)["router_aux_loss_coef"] == 0


def test_widths_that_grouped_mm_refuses_say_so():
    """Transformers 5 fails on them by default, so the config names the implementation that does not."""
    assert "experts_implementation" not in to_hugging_face(tiny_config(), 0.01)
    assert to_hugging_face(tiny_config(d_ff=18), 0.01)["experts_implementation"] == "eager"


def test_missing_settings_mean_what_transformers_assumes():
    """A config.json from before rope_theta and grouped heads."""
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64}
    values |= {"intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = from_hugging_face(values)
    assert (config.n_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10_000.0)
    assert (config.norm_eps, config.max_seq_len, config.tie_embeddings) == (1e-6, 2048, False)


def test_shorter_context_makes_a_sliding_window_harmless(folder):
    """Within the window every position is seen."""
    edit_json(folder / "config.json", sliding_window=8)
    with pytest.raises(InputError, match="sliding_window must be at least the context of 32 tokens, got 8"):
        hugging_face.load(folder)
    assert hugging_face.load(folder, max_seq_len=8).config.max_seq_len == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "one of MixtralForCausalLM, MistralForCausalLM, LlamaForCausalLM, got .Qwen2",
        ),
        ({"architectures": ["MixtralForSequenceClassification"]}, "got .MixtralForSequenceClassification"),
        ({"architectures": None, "model_type": None}, "architectures must name one of .*, got None"),
        ({"architectures": [["MixtralForCausalLM"]]}, "architectures must name one of .*, got .'MixtralForCausalLM'."),
        ({"model_type": "llama"}, "model_type must be mixtral for MixtralForCausalLM, got .llama.: they disagree"),
        ({"hidden_size": None}, "hidden_size is required"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=10000.0 and .*=500000.0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters.rope_type must be default.*, got 'yarn'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type must be default.*, got 'linear'"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor must be 1.*, got 0.5",
        ),
        ({"sliding_window": 31}, "sliding_window must be at least"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok must be at least 2, got 1: .* no gradient"),
        ({"num_local_experts": 1}, "num_local_experts must be at least 2, got 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        ({"num_attention_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads=2, got 3"),
        ({"num_key_value_heads": 2}, "k_proj.weight has shape .8, 32., config.json says .16, 32."),
        ({"num_local_experts": 5}, "experts.4.w1.weight is missing"),
        ({"num_local_experts": 3}, "experts.3.w1.weight is left over"),
        ({"num_hidden_layers": 1}, "layers.1.* is left over(.|\\n)*and 14 more"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
        ({"vocab_size": 10}, "embed_tokens.weight has shape"),
        ({"architectures": "MixtralForCausalLM"}, "architectures must be a list of one name, got .MixtralForCausalLM"),
        ({"sliding_window": "x"}, r"sliding_window must be a whole number from 1 to 2\^63 - 1 or null, got 'x'"),
        ({"sliding_window": 0}, r"sliding_window must be a whole number from 1 to 2\^63 - 1 or null, got 0"),
        ({"rope_parameters": "x"}, "rope_parameters must be .*, got 'x'"),
        ({"rope_parameters": [1]}, "rope_parameters must be .*, got .1."),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta must be a number above 0.*, got 'x'"),
        ({"rope_theta": "abc"}, "rope_theta must be a number above 0"),
        (
            {"num_attention_heads": 0, "head_dim": None},
            r"num_attention_heads must be a whole number from 1 to 2\^63 - 1, got 0",
        ),
        ({"max_position_embeddings": "x"}, "max_position_embeddings must be a whole number"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 10,000, got 1000000000"),
        ({"num_hidden_layers": 10**4}, "num_hidden_layers is 10000, .*but there are"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_models_are_refused_by_name(folder, changes, message):
    """The error says which key or tensor, what it is and what it must be."""
    if changes.get("num_attention_heads") == 3:
        changes = changes | {"num_key_value_heads": 2}
    edit_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        hugging_face.load(folder)


def test_several_problems_are_reported_together(folder):
    """Every problem has a line of its own, which names the file."""
    edit_json(folder / "config.json", hidden_act="gelu", num_experts_per_tok=1)
    with pytest.raises(InputError) as caught:
        hugging_face.load(folder)
    assert [line.startswith(str(folder / "config.json")) for line in str(caught.value).splitlines()] == [True, True]


def test_damaged_weights_are_named(folder):
    """A file that is cut off, foreign, of an unreadable type or absent is an error that names it."""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors"):
        hugging_face.load(folder)
    weights.write_bytes(b"not a tensor file at all")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors"):
        hugging_face.load(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(InputError, match=r"model\.norm\.weight is F8_E4M3"):
        hugging_face.load(folder)
    weights.unlink()
    with pytest.raises(InputError, match="weights must be safetensors"):
        hugging_face.load(folder)


def test_index_that_does_not_fit_is_named(folder):
    """A file that is not there, and a tensor that is not in its file."""
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(InputError, match=r"index\.json lists .*model-00001-of-00002\.safetensors is missing"):
        hugging_face.load(folder)
    index.write_text(json.dumps({"weight_map": {"x": "weights.safetensors"}}))
    with pytest.raises(InputError, match=r"weights\.safetensors has no x"):
        hugging_face.load(folder)
    for text in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": ["weights.safetensors"]}}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"model\.safetensors\.index\.json (is not an index|must hold|lists)"):
            hugging_face.load(folder)


def test_tied_matrix_stored_twice_is_fine(tmp_path):
    """Some writers do; a different one is refused (above)."""
    model = tiny_model(tie_embeddings=True).eval()
    hugging_face.save(model, tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    loaded = hugging_face.load(tmp_path / "x")
    assert loaded.output.weight is loaded.embedding.weight


def test_rotary_frequencies_of_old_checkpoints_are_not_left_over(folder):
    """Saved rotary frequencies are passed over, because they follow from rope_theta."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    hugging_face.load(folder)


def test_folder_without_config_is_named(tmp_path):
    """Not found, rather than not usable."""
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hugging_face.load(tmp_path)


def test_tokenizer_comes_with_its_end_of_text(folder):
    """As a name or as a description of the token; without one the folder is refused."""
    assert hugging_face.load_tokenizer(folder).end_of_text == END_OF_TEXT
    edit_json(folder / "tokenizer_config.json", eos_token={"content": END_OF_TEXT})
    assert hugging_face.load_tokenizer(folder).end_of_text == END_OF_TEXT
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match="must name an eos_token"):
        hugging_face.load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; .*save_pretrained"):
        hugging_face.load_tokenizer(folder)


def test_tokenizer_of_another_model_is_refused(folder, tmp_path):
    """Both when a folder is read and when one is written."""
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    edit_json(folder / "config.json", vocab_size=200)
    with pytest.raises(InputError, match=r"tokenizer has \d+ tokens, .* vocab_size=200"):
        hugging_face.load_tokenizer(folder)
    with pytest.raises(InputError, match=f"tokens, the model only vocab_size={VOCAB_SIZE}"):
        hugging_face.save(tiny_model(), tmp_path / "y", Tokenizer.load(tmp_path / "tokenizer.json"))


def test_tokenizer_with_a_template(folder, tmp_path):
    """A tokenizer like Llama's starts texts with <s>: kept by save, dropped for models that were trained without."""
    values = json.loads((folder / "tokenizer.json").read_text())
    start = values["added_tokens"][0] | {"id": len(values["model"]["vocab"]), "content": "<s>"}
    values["added_tokens"].append(start)
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [start["id"]], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="different models"):  # one token more than the model has
        hugging_face.load_with_tokenizer(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert tokenizer.template() == ([start["id"]], [])
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    hugging_face.save(model, tmp_path / "y", tokenizer)
    written = hugging_face.load_with_tokenizer(tmp_path / "y")
    assert written.text_start == [start["id"]]
    assert written.tokenizer.encode("the fox") == tokenizer.encode("the fox")
    assert json.loads((tmp_path / "y" / "tokenizer_config.json").read_text())["bos_token"] == "<s>"
    assert json.loads((tmp_path / "y" / "config.json").read_text())["bos_token_id"] == start["id"]
    own = dict(model.named_parameters())
    arguments = (tmp_path / "z", tokenizer, torch.float32, 0.01)
    hugging_face.export(model.config, own.__getitem__, *arguments, keep_template=False)
    assert hugging_face.load_with_tokenizer(tmp_path / "z").text_start == []
    assert json.loads((tmp_path / "z" / "tokenizer_config.json").read_text())["bos_token"] == END_OF_TEXT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": "bias"}, "model.balance: bias cannot be exported as Mixtral: .* of 2 of 2 layers"),
        ({"normalize_topk": False}, "model.normalize_topk must be true to be exported as Mixtral, got false"),
        ({"normalize_topk": False, "top_k": 1}, "rescales the weights of the top_k=1"),
    ],
    ids=str,
)
def test_settings_that_mixtral_lacks_are_refused_by_name(changes, message, tmp_path):
    """And nothing is left behind."""
    with pytest.raises(InputError, match=message):
        hugging_face.save(tiny_model(**changes), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_output_folder_must_be_new_or_empty(tmp_path):
    """Whatever was in it is untouched."""
    (tmp_path / "x").mkdir()
    hugging_face.save(tiny_model(), tmp_path / "x")  # empty is fine
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    hugging_face.save(tiny_model(), tmp_path / "link")
    assert len(list((tmp_path / "empty").iterdir())) == 2
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="got a broken link"):
        hugging_face.save(tiny_model(), tmp_path / "broken")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "thesis.txt").write_text("mine")
    for taken in (tmp_path / "x", tmp_path / "y", tmp_path / "y" / "thesis.txt"):
        with pytest.raises(InputError, match="output folder must be new or empty, got "):
            hugging_face.save(tiny_model(), taken)
    assert (tmp_path / "y" / "thesis.txt").read_text() == "mine"


def test_failed_export_leaves_nothing(tmp_path):
    """It fails at the last tensor, and the folder never appears."""
    model = tiny_model()
    own = dict(model.named_parameters())

    def read(name: str) -> torch.Tensor:
        if name == "output.weight":
            raise OSError("the disk is gone")
        return own[name]

    with pytest.raises(InputError, match="out cannot be written: the disk is gone"):
        hugging_face.export(model.config, read, tmp_path / "out", None, torch.float32, 0.01)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, folder, tmp_path):
    """In both directions: such a model is of no use to anybody."""
    model = hugging_face.load(folder)
    with torch.no_grad():
        model.blocks[1].attention.out.weight[0, 0] = value
    with pytest.raises(InputError, match=r"blocks\.1\.attention\.out\.weight has values that are not finite"):
        hugging_face.save(model, tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight has values that are not finite"):
        hugging_face.load(folder)


def test_arguments_of_the_wrong_kind_are_refused(folder, tmp_path):
    """The functions refuse a wrong dtype or context length themselves."""
    model = hugging_face.load(folder)
    with pytest.raises(ValueError, match="dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        hugging_face.save(model, tmp_path / "x", dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be .*, got 'float32'"):
        hugging_face.load(folder, dtype="float32")
    with pytest.raises(ValueError, match="max_seq_len must be at least 1, got 0"):
        hugging_face.load(folder, max_seq_len=0)
    with pytest.raises(InputError, match=r"must have a name in UTF-8, got 'x\\udcff'"):
        hugging_face.save(tiny_model(), tmp_path.with_name("x\udcff").name)
    with pytest.raises(InputError, match="must have a name"):
        hugging_face.save(model, "")


def test_folder_that_cannot_be_written_is_named_as_given(tmp_path):
    """Not by a temporary name."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"^{tmp_path}/file/out cannot be written: "):
        hugging_face.save(tiny_model(), tmp_path / "file" / "out")
