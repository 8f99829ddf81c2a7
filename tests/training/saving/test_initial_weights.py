"""What a run may start with, and what must agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import CPU, change, run_training

from moe_gpt.config import RunConfig, TokenizerConfig
from moe_gpt.errors import InputError
from moe_gpt.interop import hugging_face
from moe_gpt.training.records.metrics import read_metrics
from moe_gpt.training.setup import Run, set_up_run

DENSE = {"n_experts": 1, "top_k": 1}


def with_model(config: RunConfig, **changes: object) -> RunConfig:
    return change(config, "model", **changes)


def with_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    tokenizer = TokenizerConfig(file=str(folder / "tokenizer.json"))
    return change(config, "data", tokenizer=tokenizer)


def start(config: RunConfig, run_dir: Path, init_from: Path | None = None, **limits: int) -> Run:
    return run_training(config, run_dir, init_from=init_from, **limits)[0]


@pytest.fixture
def dense_run(small_config, tmp_path) -> Path:
    """A dense run of a few steps."""
    start(with_model(small_config, **DENSE), tmp_path / "dense", max_steps=4)
    return tmp_path / "dense"


def first_and_last_loss(run_dir: Path) -> tuple[float, float]:
    losses = [
        line["val/code/ce_loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "val/code/ce_loss" in line
    ]
    return losses[0], losses[-1]


@pytest.mark.parametrize("form", ["run", "hugging_face"])
def test_dense_weights_start_a_mixture(form, small_config, dense_run, tmp_path):
    """The first evaluation is the dense run's last; then it learns; and the checkpoint says where it came from."""
    origin, config = dense_run, small_config
    if form == "hugging_face":
        run = set_up_run(with_model(small_config, **DENSE), tmp_path / "x", CPU, init_from=str(dense_run))
        origin = tmp_path / "llama"
        hugging_face.save(run.state.model, origin, run.data.tokenizer)
        config = with_tokenizer(config, origin)
    run = start(config, tmp_path / "mixture", origin, max_steps=8)
    first, last = first_and_last_loss(tmp_path / "mixture")
    assert first == pytest.approx(first_and_last_loss(dense_run)[1], abs=1e-4)
    assert last < first - 0.2
    assert run.state.model.config.n_experts == 4
    assert str(run.identity.initialised_from).startswith(str(origin))
    assert "every expert as its feed-forward" in run.identity.initialised_from


def test_rescaling_is_needed_to_start_from_a_dense_model(small_config, dense_run, tmp_path):
    """Without it the mixture would start as another function."""
    with pytest.raises(InputError, match="normalize_topk must be true to start from a dense model, got false"):
        start(with_model(small_config, normalize_topk=False), tmp_path / "mixture", dense_run)


def test_every_difference_is_named_with_what_to_add(small_config, dense_run, tmp_path):
    """Model and tokenizer together, as overrides to copy."""
    other = with_model(small_config, d_ff=48, norm_eps=1e-3)
    with pytest.raises(InputError) as caught:
        start(change(other, "data", tokenizer=TokenizerConfig(vocab_size=300)), tmp_path / "mixture", dense_run)
    assert "model.d_ff is 32 in that model, got 48" in str(caught.value)
    last = str(caught.value).splitlines()[-1]
    assert last == "to match that model, add: model.d_ff=32 model.norm_eps=1e-05 data.tokenizer.vocab_size=400"


def test_balancing_by_bias_can_begin_later(small_config, tmp_path):
    """A bias that starts at zero changes nothing; the other way would change the function and is refused."""
    start(small_config, tmp_path / "loss", max_steps=2)
    start(with_model(small_config, balance="bias"), tmp_path / "bias", tmp_path / "loss", max_steps=2)
    first, _ = first_and_last_loss(tmp_path / "bias")
    assert first == pytest.approx(first_and_last_loss(tmp_path / "loss")[1], abs=1e-4)
    with pytest.raises(InputError, match="model.balance is 'bias' in that model, got 'loss'"):
        start(small_config, tmp_path / "back", tmp_path / "bias")


def test_vocabulary_follows_the_weights(small_config, tmp_path):
    """A padded embedding stays padded where the config names no size, also after a resume."""
    start(with_model(small_config, vocab_size=448), tmp_path / "padded", max_steps=1)
    run = start(small_config, tmp_path / "next", tmp_path / "padded", max_steps=1)
    assert run.state.model.output.weight.shape[0] == 448
    resumed = set_up_run(small_config, tmp_path / "next", CPU, resume=True)
    assert resumed.state.model.output.weight.shape[0] == 448


def test_tokenizer_of_another_text_is_refused(small_config, dense_run, tmp_path):
    """An equal file at another path is fine, another tokenizer is not."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "tokenizer.json").write_text((dense_run / "tokenizer.json").read_text())
    start(with_tokenizer(small_config, copy), tmp_path / "mixture", dense_run, max_steps=1)
    text = (copy / "tokenizer.json").read_text().replace("<|endoftext|>", "<|end|>")
    (copy / "tokenizer.json").write_text(text)
    other = TokenizerConfig(file=str(copy / "tokenizer.json"), end_of_text="<|end|>")
    with pytest.raises(InputError, match="data.tokenizer.file is None in that model, got"):
        start(change(small_config, "data", tokenizer=other), tmp_path / "other", dense_run)


def test_sliding_window_matters_only_beyond_it(small_config, tmp_path):
    """The context that counts is the run's."""
    run = start(small_config, tmp_path / "first", max_steps=1)
    folder = tmp_path / "hf"
    hugging_face.save(run.state.model, folder, run.data.tokenizer)
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text().replace('"sliding_window": null', '"sliding_window": 64'))
    start(with_tokenizer(small_config, folder), tmp_path / "same", folder, max_steps=1)
    with pytest.raises(InputError, match="sliding_window must be at least the context of 128 tokens"):
        start(with_model(with_tokenizer(small_config, folder), max_seq_len=128), tmp_path / "longer", folder)


def test_start_of_a_run_says_what_is_special(small_config, dense_run, tmp_path):
    """That experts are upcycled, and that a tokenizer's own template is not used in training."""
    said: list[str] = []
    set_up_run(small_config, tmp_path / "mixture", CPU, init_from=str(dense_run), say=said.append)
    assert any("each of the 4 experts" in line and "model.n_experts=1" in line for line in said)
    run = set_up_run(with_model(small_config, **DENSE), tmp_path / "x", CPU, init_from=str(dense_run))
    folder = tmp_path / "llama"
    hugging_face.save(run.state.model, folder, run.data.tokenizer)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    said.clear()
    config = with_model(with_tokenizer(small_config, folder), **DENSE)
    set_up_run(config, tmp_path / "next", CPU, init_from=str(folder), say=said.append)
    assert any("<|endoftext|> around every text" in line for line in said)


def test_damaged_folder_is_noticed_before_settings_are_compared(small_config, dense_run, tmp_path):
    """The first error is the one that matters."""
    run = set_up_run(with_model(small_config, **DENSE), tmp_path / "x", CPU, init_from=str(dense_run))
    hugging_face.save(run.state.model, tmp_path / "llama", run.data.tokenizer)
    weights = tmp_path / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        start(with_model(small_config, d_ff=48), tmp_path / "next", tmp_path / "llama")
