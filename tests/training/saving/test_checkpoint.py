"""Checkpoints: complete or absent, verified, and of the model they are loaded into."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from made_up_checkpoint import make_run, save_checkpoint

from moe_gpt.config import RunConfig
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files import durable
from moe_gpt.files import tensors as tensor_files
from moe_gpt.training.saving import checkpoint, write
from moe_gpt.training.saving.checkpoint import load_training_state
from moe_gpt.training.saving.listing import list_checkpoints, verify_checkpoint
from moe_gpt.training.saving.manifest import FILES, FILES_TO_USE_A_MODEL
from moe_gpt.training.saving.saved_model import load_model, resolve_checkpoint


@pytest.mark.parametrize(
    "settings",
    [{}, {"balance": "bias"}, {"tie_embeddings": True, "attention_sharing": 2}, {"n_experts": 1, "top_k": 1}],
)
def test_checkpoint_restores_everything(tmp_path, settings):
    """Weights, bias, moments, progress and torch's generator come back bit for bit."""
    state, identity = make_run(0, **settings)
    path = save_checkpoint(tmp_path, state, identity, keep_last=1)
    expected_random = torch.rand(3)
    other, _ = make_run(1, **settings)
    load_training_state(other, path)
    assert torch.equal(torch.rand(3), expected_random)
    assert (other.step, other.tokens_seen) == (state.step, state.tokens_seen)
    saved, loaded = state.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    for a, b in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert all(torch.equal(state.optimizer.state[a][k], other.optimizer.state[b][k]) for k in ("exp_avg", "step"))


def test_checkpoint_of_equal_state_has_equal_files(tmp_path):
    """Saving the same state twice gives the same bytes."""
    state, identity = make_run()
    first, second = (save_checkpoint(tmp_path / name, state, identity, keep_last=1) for name in "ab")
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_checkpoint_holds_no_pickle(tmp_path):
    """Every file is safetensors, JSON or YAML."""
    state, identity = make_run()
    path = save_checkpoint(tmp_path, state, identity, keep_last=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".yaml"}


@pytest.mark.parametrize("n_written", range(7))
def test_checkpoint_that_fails_half_way_leaves_the_older_ones(tmp_path, monkeypatch, n_written):
    """An error while writing leaves no new folder, no temporary one, and the previous checkpoint intact."""
    state, identity = make_run()
    first = save_checkpoint(tmp_path, state, identity, keep_last=1)
    state.step += 1

    real = durable.write_file
    written = []

    def full_disk(path, chunks):
        if len(written) == n_written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return real(path, chunks)

    for module in (write, tensor_files):
        monkeypatch.setattr(module, "write_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, state, identity, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    verify_checkpoint(first)


def test_checkpoint_under_another_name_is_not_found(tmp_path):
    """Neither what is being written nor what was set aside is taken for a checkpoint."""
    state, identity = make_run()
    first = save_checkpoint(tmp_path, state, identity, keep_last=3)
    for name in ("step_00000009.tmp-x1", "step_00000008.damaged-1", "step_7", "other"):
        shutil.copytree(first, first.with_name(name))
    assert list_checkpoints(tmp_path) == [first]
    assert resolve_checkpoint(tmp_path) == first


def test_checkpoint_keeps_the_last_ones(tmp_path):
    """keep_last: 2 leaves the two newest."""
    state, identity = make_run()
    for state.step in (1, 2, 10, 100):
        save_checkpoint(tmp_path, state, identity, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000100"]


DAMAGE = {
    "truncate": r"{name} has [\d,]+ bytes, but [\d,]+ were",
    "extend": r"{name} has [\d,]+ bytes, but [\d,]+ were",
    "flip": r"{name} .*its SHA-256 differs",
    "delete": r"{name} is missing",
    "swap": r"{name} (.*its SHA-256 differs|has [\d,]+ bytes)",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoint_damage_is_named(tmp_path, name, damage):
    """Each file, damaged in each way, is found by the manifest and named."""
    state, identity = make_run()
    path = save_checkpoint(tmp_path, state, identity, keep_last=1)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "swap":  # with that of another run at the same step
        other, other_facts = make_run(1, d_ff=48)
        torch.manual_seed(5)
        other_facts = other_facts._replace(tokenizer=train_tokenizer(["quite another text"], 290))
        other_facts = other_facts._replace(config=RunConfig(model=other.model.config))
        other.tokens_seen += 1
        shutil.copy(save_checkpoint(tmp_path / "other", other, other_facts) / name, file)
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes({"flip": content, "truncate": content[:-1], "extend": content + b" "}[damage])
    with pytest.raises(InputError, match=DAMAGE[damage].format(name=name.replace(".", r"\."))):
        verify_checkpoint(path)
    if name in FILES_TO_USE_A_MODEL:
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            load_model(path)


def test_newest_good_checkpoint_of_a_run_is_used_and_what_is_not_is_named(tmp_path):
    """One that is named outright is an error."""
    state, identity = make_run()
    first = save_checkpoint(tmp_path, state, identity)
    state.step += 1
    second = save_checkpoint(tmp_path, state, identity)
    (second / "model.safetensors").write_bytes(b"")
    (first.parent / "step_00000003").mkdir()
    (first.parent / "step_00000004").write_text("no folder")
    (first.parent / "step_00000005").symlink_to("nowhere")
    with pytest.warns(UserWarning, match="undamaged checkpoint") as warned:
        assert load_model(tmp_path).path == first
    told = "\n".join(str(warning.message) for warning in warned)
    for text in ("has 0 bytes", "3 is an empty folder", "4 is a file, not a folder", "5 is a link that leads nowhere"):
        assert text in told
    for path in (second, *(first.parent / f"step_0000000{n}" for n in (3, 4, 5))):
        with pytest.raises(InputError):
            load_model(path)


def test_renamed_checkpoint_is_named(tmp_path):
    """A checkpoint of another step than its name says is not used."""
    state, identity = make_run()
    path = save_checkpoint(tmp_path, state, identity)
    path = path.rename(path.with_name("step_00000099"))
    with pytest.raises(InputError, match=r"state\.json is of step 1; if the folder was renamed, name it step_00000001"):
        verify_checkpoint(path)


def test_checkpoint_of_another_format_is_refused(tmp_path):
    """The error names both versions."""
    state, identity = make_run()
    path = save_checkpoint(tmp_path, state, identity, keep_last=1)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**values, "format_version": 7}))
    with pytest.raises(InputError, match="format version 7.* reads 1 and 2"):
        checkpoint.read_state(path)


def test_checkpoint_of_the_first_format_is_read(tmp_path):
    """What it does not have begins as it does in a new run."""
    state, identity = make_run()
    path = save_checkpoint(tmp_path, state, identity)
    values = json.loads((path / "state.json").read_text())
    old = {key: values[key] for key in ("step", "tokens_seen", "data_fingerprint", "environment", "initialised_from")}
    (path / "state.json").write_text(json.dumps({**old, "format_version": 1}))
    other, _ = make_run(1)
    load_training_state(other, path)
    assert (other.step, other.skipped_windows, other.skips_in_a_row, other.rollbacks) == (state.step, [], 0, 0)


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    """The error names a tensor with both shapes, and tensors that are missing."""
    state, identity = make_run()
    path = save_checkpoint(tmp_path, state, identity, keep_last=1)
    wider, _ = make_run(d_ff=48)
    with pytest.raises(InputError, match=r"down has shape \(4, 32, 32\), the model wants \(4, 32, 48\)"):
        checkpoint.read_weights(path, wider.model.config)
    deeper, _ = make_run(n_layers=3)
    with pytest.raises(InputError, match=r"blocks\.2\.attention.*is missing"):
        checkpoint.read_weights(path, deeper.model.config)


def test_load_model_gives_the_trained_model(tmp_path):
    """load_model returns the same function, in evaluation mode, with its tokenizer."""
    state, identity = make_run()
    save_checkpoint(tmp_path, state, identity, keep_last=1)
    loaded = load_model(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.model(tokens).logits, state.model.eval()(tokens).logits)
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("text")) == "text"


def test_load_model_names_a_path_that_is_no_run(tmp_path):
    """A folder without checkpoints is named with what would be accepted."""
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint at .*give a run folder"):
        load_model(tmp_path / "nowhere")
