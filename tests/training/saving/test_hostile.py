"""Files from strangers: nothing in them runs, nothing outside the folder is touched, every end is a clear one."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import CPU, run_training

from moe_gpt.config import RunConfig
from moe_gpt.config.yaml import load_run_config, parse_yaml, to_plain, to_yaml
from moe_gpt.errors import InputError
from moe_gpt.files.durable import read_digest
from moe_gpt.report.run_records import read_run
from moe_gpt.training.saving.checkpoint import read_state
from moe_gpt.training.saving.listing import list_checkpoints, verify_checkpoint
from moe_gpt.training.saving.manifest import FILES, FILES_TO_USE_A_MODEL, MANIFEST, read_manifest
from moe_gpt.training.saving.run_folder import hold
from moe_gpt.training.saving.saved_model import load_model
from moe_gpt.training.setup import set_up_run


class Bomb:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def saved(small_values, tmp_path_factory):
    """A run with one checkpoint; tests copy it."""
    run_dir = tmp_path_factory.mktemp("hostile") / "run"
    run_training(RunConfig.from_mapping(small_values), run_dir, max_steps=1)
    return run_dir


@pytest.fixture
def path(saved, tmp_path):
    """A copy of the checkpoint."""
    shutil.copytree(saved, tmp_path / "run")
    return list_checkpoints(tmp_path / "run")[0]


def make_manifest_fit(path) -> None:
    """Give a changed checkpoint a manifest that agrees with it, as a stranger would."""
    manifest = {name: read_digest(path / name)._asdict() for name in FILES}
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_pickles_are_never_opened(name, path, small_values, tmp_path):
    """In place of any file, with a manifest that fits."""
    (path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "pwned")))
    if name != MANIFEST:
        make_manifest_fit(path)
    if name in (*FILES_TO_USE_A_MODEL, MANIFEST):
        with pytest.raises(InputError):
            load_model(path)
    with pytest.raises(InputError):
        set_up_run(RunConfig.from_mapping(small_values), path.parents[1], CPU, resume=True)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "model: !!python/object/new:open [pwned, w]",
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]" for i in range(9)),
        "[" * 5000,
        "model: {n_layers: " + "9" * 5000 + "}",
        "model: {n_layers: 1e400}",
        "\x00",
        "? {a: b}\n: c",
    ],
    ids=["apply", "new", "laughs", "deep", "digits", "infinite", "nul", "odd_key"],
)
def test_hostile_yaml_is_one_short_error(text, path, tmp_path, monkeypatch):
    """As a config file and as a checkpoint's config; nothing runs, nothing explodes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_run_config(tmp_path / "evil.yaml")
    assert len(str(caught.value)) < 5000
    (path / "config.yaml").write_text(text)
    make_manifest_fit(path)
    with pytest.raises(InputError):
        load_model(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"../../../outside": {"bytes": 1, "sha256": "x"}},
        lambda m: m | {"/etc/passwd": {"bytes": 1, "sha256": "x"}},
        lambda m: {k: v for k, v in m.items() if k != "rng.safetensors"},
        lambda m: m | {"state.json": {"bytes": 10**18, "sha256": "x"}},
        lambda m: m | {"state.json": {"bytes": "many", "sha256": None}},
        lambda m: m | {"state.json": {"bytes": 1}},
        lambda m: m | {"state.json": [1]},
        lambda m: [m],
        lambda m: None,
        lambda m: "x" * 2_000_000,
    ],
)
def test_hostile_manifests_are_refused(change, path, tmp_path):
    """Paths that lead outside, missing and foreign entries, sizes of fantasy, other types, too much of it."""
    (path / MANIFEST).write_text(json.dumps(change(json.loads((path / MANIFEST).read_text()))))
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"checkpoint .*(manifest\.json cannot be used|state\.json has)"):
        verify_checkpoint(path)
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_links_out_of_a_checkpoint_are_refused(name, path, small_values, tmp_path):
    """Though what they lead to is what the manifest says."""
    (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=f"{name} is a link to .*outside of its folder"):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "events.jsonl"])
def test_training_writes_to_no_file_outside(name, path, tmp_path):
    """Where a stranger's run folder links to one; reports neither take the lock nor read it."""
    run_dir = path.parents[1]
    (tmp_path / "mine").write_text("mine")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=f"{name} is a link to"), hold(run_dir):
        pass
    assert not read_run(run_dir).is_training
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": True},
        {"tokens_seen": "1"},
        {"data_fingerprint": []},
        {"environment": None},
        {"skipped_windows": [[1]]},
        {"skipped_windows": 0.5},
        {"router": {"digest": "x"}},
        {"schedule": "cosine"},
        {"score": []},
    ],
    ids=str,
)
def test_states_of_another_form_are_refused(changes, path):
    """Every key is checked before it is used; the message names it."""
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | changes))
    with pytest.raises(InputError, match=rf"checkpoint .*state\.json cannot be used: {next(iter(changes))}\b.*, got"):
        read_state(path)


@pytest.mark.parametrize("change", ["missing", "shape", "generator"])
def test_optimizer_and_generators_are_checked_before_use(change, path, small_values):
    """A moment that is missing or of another shape, a generator's state that is none."""
    file = path / ("rng.safetensors" if change == "generator" else "optimizer.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("exp_avg" if change != "generator" else "cpu"))
    tensors[name] = torch.zeros(3, dtype=tensors[name].dtype)
    if change == "missing":
        del tensors[name]
    save_file(tensors, file)
    make_manifest_fit(path)
    with pytest.raises(InputError, match=f"{name} .*(is missing|has shape)" if change != "generator" else file.name):
        set_up_run(RunConfig.from_mapping(small_values), path.parents[1], CPU, resume=True)


def test_manifest_that_is_too_deep_is_refused(path):
    """JSON can be nested until the parser gives up."""
    (path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be used"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 10**7, "n_layers": 2},
        {"n_layers": 10**4},
        {"vocab_size": 10**12},
        {"n_experts": 10**6},
        {"d_ff": 10**18},
    ],
    ids=str,
)
def test_nothing_is_allocated_that_the_file_does_not_hold(changes, path, monkeypatch):
    """A config that asks for terabytes is compared with the weights' shapes before there is a model."""
    config = to_plain(load_model(path).config)
    config["model"] |= changes
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    make_manifest_fit(path)
    real = torch.empty
    sizes = []

    def empty(*shape, **rest):
        result = real(*shape, **rest)
        if not result.is_meta:
            sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(InputError, match="is of another model|must give tensors of at most"):
        load_model(path)
    assert sum(sizes) < 10**6


def test_safetensors_whose_header_lies_is_refused(path):
    """A header longer than the file, offsets beyond its end."""
    for header in (b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}', b""):
        size = (len(header) if header else 2**60).to_bytes(8, "little")
        (path / "model.safetensors").write_bytes(size + header)
        make_manifest_fit(path)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors"):
            load_model(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([*FILES, MANIFEST]),
    content=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()),
)
def test_fuzzed_files_end_in_a_clear_error(name, content, saved, tmp_path_factory):
    """Whatever a file holds, loading ends in an error of ours (or works)."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(saved, folder / "run")
    (path,) = list_checkpoints(folder / "run")
    (path / name).write_bytes(content)
    if name != MANIFEST:
        make_manifest_fit(path)
    with contextlib.suppress(InputError):
        load_model(path)
    shutil.rmtree(folder)


KEYS = st.sampled_from(["model", "data", "schedule", "stages", "n_layers", "lr", "sources", "files", "faults", "x"])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        JSON, lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=3), max_leaves=9
    )
)
def test_fuzzed_configs_end_in_a_clear_error(values):
    """Any YAML is a config or a list of problems."""
    with contextlib.suppress(InputError):
        RunConfig.from_mapping(parse_yaml(yaml.safe_dump(values), "fuzz"))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.floats(1e-9, 1e3),
    st.text(min_size=1, max_size=20).filter(lambda text: "\x00" not in text),
    st.sampled_from([64, [64, 128], [128, 64]]),
)
def test_configs_survive_their_file(n_layers, lr, prompt, batch_tokens):
    """Written as YAML and read again, a config is equal."""
    config = RunConfig.from_mapping(
        {
            "model": {"n_layers": n_layers},
            "optimizer": {"lr": lr},
            "data": {"sources": [{"name": "a", "builtin": "prose", "prompt": prompt}]},
            "schedule": {"stages": [{"seq_len": 32, "batch_tokens": batch_tokens}]},
        }
    )
    assert RunConfig.from_mapping(parse_yaml(to_yaml(config), "again")) == config


@given(
    st.dictionaries(st.sampled_from(FILES), st.tuples(st.integers(0, 10**15), st.text("0123456789abcdef", max_size=64)))
)
def test_manifest_is_read_as_it_was_written(identity):
    """All six files with size and digest, or it is refused."""
    values = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in identity.items()}

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_text(json.dumps(values))
        if set(values) == set(FILES):
            assert {n: f._asdict() for n, f in read_manifest(Path(folder)).items()} == values
        else:
            with pytest.raises(InputError, match="must list"):
                read_manifest(Path(folder))
