"""Model folders as they are found: wrapped, half downloaded, with tokens added, or made to lead outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

import moe_gpt
from moe_gpt.commands.evaluate import EvaluateOptions, evaluate
from moe_gpt.commands.generate import GenerateOptions, generate
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.tensors import TensorReader, TensorSpec, write_sharded
from moe_gpt.interop import hugging_face
from moe_gpt.training.saving.saved_model import resolve_checkpoint

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny Mixtral with a tokenizer."""
    tokenizer = train_tokenizer(["the quick brown fox " * 20], 300)
    folder = tmp_path_factory.mktemp("made") / "model"
    hugging_face.save(tiny_model(vocab_size=tokenizer.vocab_size), folder, tokenizer)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "model")


@pytest.fixture
def sharded(folder) -> Path:
    """The same with its weights in three files."""
    reader = TensorReader([folder / WEIGHTS])
    specs = [TensorSpec(name, reader.shape(name), torch.float32) for name in reader.names]
    write_sharded(folder, specs, reader.read, max_file_bytes=60_000)
    (folder / WEIGHTS).unlink()
    assert (folder / FIRST).is_file()
    return folder


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, message: str) -> str:
    """Check that loading is refused in one line; return it."""
    with pytest.raises(InputError, match=message) as caught:
        moe_gpt.load(folder, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "tokenizer.json", "tokenizer_config.json"])
def test_links_out_of_the_folder_are_refused(name, folder):
    """Whichever file it is, to a good one elsewhere, to nothing, and to itself."""
    (folder / name).rename(folder.parent / "outside")
    for target, message in [("../outside", "outside of its folder"), ("gone", "is not there"), (name, "to itself")]:
        (folder / name).symlink_to(target)
        refused(folder, f"{name} .*{message}")
        (folder / name).unlink()


@pytest.mark.parametrize("is_sharded", [True, False])
def test_the_cache_of_hugging_face_is_read(is_sharded, request, tmp_path, capsys):
    """Every file is a link to a blob of the same repository, by a relative path; the path may end in a link, too."""
    plain = request.getfixturevalue("sharded" if is_sharded else "folder")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
    for place in (blobs, snapshot):
        place.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    (tmp_path / "latest").symlink_to(snapshot)
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox")
    for given in (snapshot, tmp_path / "latest"):
        assert moe_gpt.load(given, "cpu").tokenizer
        generate(str(given), options=GenerateOptions(prompt="the", max_new_tokens=1, device="cpu"))
        evaluate(str(given), options=EvaluateOptions(files=(str(text),), device="cpu"))
    assert "bits_per_byte" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"give one of these: .*snapshots/1f"):
        moe_gpt.load(snapshot.parents[1], "cpu")
    (tmp_path / "models--c" / "blobs").mkdir(parents=True)
    (snapshot / CONFIG).resolve().rename(tmp_path / "models--c" / "blobs" / "0a")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../../models--c/blobs/0a")
    refused(snapshot, "outside of its folder")


@pytest.mark.parametrize("place", ["../outside", "/etc/passwd", "sub/x.safetensors", "..\\x", "a\0b", "", None, 3])
def test_an_index_names_files_of_its_folder(place, sharded):
    """The message names the index and the name in it."""
    (sharded / FIRST).rename(sharded.parent / "outside")
    places = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={name: place if file == FIRST else file for name, file in places.items()})
    refused(sharded, r"index\.json lists a file that cannot be used: ")


def test_shards_that_do_not_fit_their_index_are_named(sharded):
    """A missing one, one without its tensor, one that is elsewhere; a download beside it is named."""
    places = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=places | {"model.norm.weight": FIRST})
    refused(sharded, rf"{FIRST} has no model\.norm\.weight, which {INDEX} says it has")
    edit(sharded / INDEX, weight_map=places)
    (sharded / FIRST).rename(sharded / f"{FIRST}.part")
    refused(sharded, rf"index\.json lists .*{FIRST} is missing; .*{FIRST}\.part is a download that has not ended")


def test_weights_in_two_ways_are_refused(sharded, made):
    """A whole file beside an index of other files; transformers takes the whole one. An index of that file is fine."""
    shutil.copy(made / WEIGHTS, sharded / WEIGHTS)
    refused(sharded, rf"two sets of weights: {WEIGHTS}, .*{INDEX}, which names '{FIRST}'; remove one")
    places = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=dict.fromkeys(places, WEIGHTS))
    assert moe_gpt.load(sharded, "cpu")
    edit(sharded / CONFIG, transformers_weights=FIRST)  # transformers would load this file
    refused(sharded, rf"transformers_weights must be absent .*{FIRST}")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_whole_weights_is_refused(name, folder):
    """With it, the model is another function; without whole weights, the remedy is another."""
    (folder / name).touch()
    refused(folder, rf"{name} lies beside whole weights.*merge_and_unload.*elsewhere")
    (folder / WEIGHTS).unlink()
    refused(folder, rf"neither .*{name} is a LoRA adapter without its model")


def test_a_file_that_aria2_has_not_filled_is_refused(folder):
    """It is as long as it will be, so its header cannot tell."""
    (folder / f"{WEIGHTS}.aria2").touch()
    refused(folder, r"model\.safetensors is not complete; .*aria2 is a download that has not ended")


def test_weights_that_are_cut_off_say_how_much_is_there(folder):
    """In the data and in the header."""
    whole = (folder / WEIGHTS).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100):
        (folder / WEIGHTS).write_bytes(whole[:size])
        refused(folder, rf"model\.safetensors cannot .*: it has {size:,} of the .* bytes that its header says")
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, r"model\.safetensors cannot be read as safetensors: it is a Git LFS pointer")


def test_a_tokenizer_of_another_kind_says_how_to_make_one(folder):
    """The weights load; text needs a tokenizer.json."""
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(InputError, match=r"has no tokenizer\.json, .*AutoTokenizer.* makes one"):
        moe_gpt.load(folder, "cpu").encode("the")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "rope_theta", "num_local_experts"])
def test_a_number_in_quotes_is_refused(key, folder):
    """In a config of ours, 1e4 is another matter, because YAML takes it for text."""
    edit(folder / CONFIG, **{key: str(json.loads((folder / CONFIG).read_text())[key])})
    refused(folder, rf"{key} must be a number without quotes, got '")


@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", "tokenizer_config.json"])
def test_pages_and_pointers_are_named(name, folder):
    """In the place of each file of text."""
    for content, what in [
        ("<!doctype html>", "web page"),
        ("version https://git-lfs", "Git LFS pointer"),
        ("", "empty"),
    ]:
        (folder / name).write_text(content)
        refused(folder, f"{name} is not .*it is .*{what}")


def test_other_weights_are_named_with_their_remedy(folder):
    """With and without a config.json."""
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, r"neither model\.safetensors .*pytorch_model\.bin .* save_pretrained\(")
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin .* save_pretrained\("):
        resolve_checkpoint(folder)


@pytest.mark.parametrize(
    ("rename", "name", "remedy"),
    [
        (lambda n: f"module.{n}", "module.model.layers.0", "save model.module"),
        (lambda n: f"_orig_mod.{n}", "_orig_mod.model.layers.0", "torch.compile; save model._orig_mod"),
        (lambda n: f"module._orig_mod.{n}", "module._orig_mod.model.layers.0", "torch.compile"),
        (lambda n: n.replace("layers.0.", "layers.0._orig_mod."), r"model.layers.0._orig_mod\.", "torch.compile"),
        (lambda n: f"model.{n}", "model.model.layers.0", "save_pretrained"),
        (lambda n: n.removeprefix("model."), "'layers.0", "save_pretrained"),
        (lambda n: f"base_model.model.{n}", "base_model.model.model.layers", "merge_and_unload"),
        (lambda n: n.replace("o_proj.", "o_proj.lora_A."), "lora_A", "LoRA adapter.*merge_and_unload"),
    ],
)
def test_wrapped_names_are_named_with_their_remedy(rename, name, remedy, folder):
    """Instead of a list of missing tensors."""
    save_file({rename(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    refused(folder, f"a tensor is named .*{name}.*: .*{remedy}")


def add_token(folder: Path, content: str, special: bool = True) -> int:
    """Add a token after the last; return its id."""
    values = json.loads((folder / "tokenizer.json").read_text())
    added = values["added_tokens"][0] | {"id": len(values["model"]["vocab"]), "content": content, "special": special}
    values["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return added["id"]


def test_a_special_token_without_embedding_may_be_there(folder):
    """Text that spells it stays text, so the model is what it was."""
    before = moe_gpt.load(folder, "cpu")
    add_token(folder, "[PAD]")
    after = moe_gpt.load(folder, "cpu")
    assert after.tokenizer.vocab_size == before.config.vocab_size
    assert after.encode("the [PAD] fox") == before.encode("the [PAD] fox")
    assert after.generate("the ", 8, seed=3) == before.generate("the ", 8, seed=3)
    assert after.evaluate("the quick [PAD] fox\n") == before.evaluate("the quick [PAD] fox\n")
    moe_gpt.save(after, folder.parent / "again")
    assert moe_gpt.load(folder.parent / "again", "cpu").encode("[PAD]") == before.encode("[PAD]")


@pytest.mark.parametrize(("content", "special"), [("quick", False), ("<|end|>", True)])
def test_a_token_that_texts_need_must_have_an_embedding(content, special, folder):
    """An ordinary one, and the one that ends a text; the remedy is named."""
    token = add_token(folder, content, special)
    if special:
        edit(folder / "tokenizer_config.json", eos_token=content)
    message = refused(folder, f"vocab_size={token}.*resize_token_embeddings")
    assert content in message or not special


def test_a_shorter_context_is_given_by_an_argument(folder):
    """The error about a sliding window names it."""
    edit(folder / CONFIG, sliding_window=8)
    refused(folder, r"with --max-seq-len 8 \(in Python max_seq_len=8")
    assert moe_gpt.load(folder, "cpu", max_seq_len=8).config.max_seq_len == 8
    (folder / "tokenizer.json").unlink()
    assert moe_gpt.load(folder, "cpu", max_seq_len=8).config.max_seq_len == 8
    with pytest.raises(InputError, match="max_seq_len must be"):
        moe_gpt.load(folder, "cpu", max_seq_len=0)


def test_a_shorter_context_is_given_on_the_command_line(folder, capsys):
    """To generate and to evaluate, whose windows then have that length."""
    edit(folder / CONFIG, sliding_window=8)
    generate(str(folder), options=GenerateOptions(prompt="the ", max_new_tokens=20, max_seq_len=8, device="cpu"))
    assert "the context of 8 tokens is full" in capsys.readouterr().err
    (folder / "text.txt").write_text("the quick brown fox " * 5)
    files = (str(folder / "text.txt"),)
    evaluate(str(folder), options=EvaluateOptions(files=files, max_seq_len=8, device="cpu", precision="fp32"))
    assert "the window has 8 tokens and advances by 4" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-seq-len needs --files"):
        evaluate(str(folder), options=EvaluateOptions(max_seq_len=8))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_local_experts"])
@pytest.mark.parametrize("number", [2**40, 2**62, 2**64, 10**400], ids=["2^40", "2^62", "2^64", "10^400"])
def test_absurd_sizes_are_refused_at_once(key, number, folder):
    """Sizes that torch cannot count, and numbers of experts that take for ever to list."""
    edit(folder / CONFIG, **{key: number})
    with pytest.raises(InputError):
        hugging_face.check(folder)


def test_a_tokenizer_that_makes_the_library_panic_is_refused(folder):
    """A prefix that is longer than the tokens: found by the fuzzer."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["continuing_subword_prefix"] = "x" * 1000
    (folder / "tokenizer.json").write_text(json.dumps(values))
    refused(folder, "tokenizer.json is not a tokenizer.json")


def test_an_id_that_the_library_would_count_up_to_is_refused(folder):
    """It takes minutes where ids have a gap of billions: found by the fuzzer."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["fox"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(values))
    refused(folder, "tokenizer.json must have ids below 10,000,000, got 2147483648")
