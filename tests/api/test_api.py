"""The Python API: train, load, save, read; text in, text out."""

from __future__ import annotations

import inspect
import json

import pandas
import pytest
import torch
from run_scripts import script
from tiny_models import tiny_model

import moe_gpt
from moe_gpt.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def yaml_file(small_values, tmp_path_factory):
    """The small run as a file."""
    import yaml

    path = tmp_path_factory.mktemp("api") / "small.yaml"
    path.write_text(yaml.safe_dump(small_values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(yaml_file):
    """A run of six steps made by ``moe_gpt.train``."""
    return moe_gpt.train(
        yaml_file,
        {"model.n_layers": 3, "optimizer.lr": 1e-2},
        yaml_file.parent / "run",
        max_steps=6,
        say=lambda _: None,
    )


@pytest.fixture(scope="module")
def loaded(run):
    """The model of the run."""
    return moe_gpt.load(run.run_dir, "cpu")


def test_train_returns_the_run(run, yaml_file):
    """Overrides count, the model is trained, and the folder is that of a run."""
    assert (run.config.model.n_layers, run.config.optimizer.lr, run.state.step) == (3, 1e-2, 6)
    assert run.run_dir == yaml_file.parent / "run"
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= {path.name for path in run.run_dir.iterdir()}


def test_train_does_what_the_command_does(run, yaml_file, tmp_path):
    """The same settings give the same losses on the command line; overrides may be a list."""
    overrides = ["model.n_layers=3", "optimizer.lr=1e-2"]
    words = ["--config", yaml_file, "--run-dir", tmp_path / "run", "--max-steps", 6]
    assert script("train.py", *words, *overrides).returncode == 0
    again = moe_gpt.train(yaml_file, overrides, tmp_path / "api", max_steps=6, say=lambda _: None)
    losses = [
        moe_gpt.read_run(folder).metrics["loss"].tolist() for folder in (run.run_dir, tmp_path / "run", again.run_dir)
    ]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"overrides": {"model.n_layer": 2}}, "n_layers"),
        ({"overrides": "model.n_layers=2"}, "overrides"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_minutes": -1}, "max_minutes"),
        ({"fit_schedule": True}, "max-steps"),
        ({"allow_changes": ["code"]}, "resume"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_train_refuses_bad_arguments(yaml_file, tmp_path, options, wanted):
    """Each is an error that names it, before anything is written."""
    with pytest.raises(InputError, match=wanted):
        moe_gpt.train(yaml_file, run_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_train_takes_a_config_of_python(small_config, tmp_path):
    """A RunConfig needs a run_dir, and takes no overrides."""
    with pytest.raises(InputError, match="run_dir"):
        moe_gpt.train(small_config)
    assert moe_gpt.train(small_config, run_dir=tmp_path, max_steps=1, say=lambda _: None).state.step == 1


def test_full_size_config_is_for_plans(tmp_path):
    """gpt4.yaml is refused with its size, and the error names the command that it is for."""
    with pytest.raises(InputError, match=r"trillion parameters.*moe-gpt plan"):
        moe_gpt.train("gpt4.yaml", run_dir=tmp_path / "run")


def test_generate_is_text_in_text_out(loaded):
    """Equal arguments give equal text, another seed another; greedy needs none; pieces join to the whole."""
    first = loaded.generate("def ", max_new_tokens=20, seed=1)
    assert first == loaded.generate("def ", max_new_tokens=20, seed=1)
    assert first != loaded.generate("def ", max_new_tokens=20, seed=2)
    greedy = [loaded.generate("def ", 20, temperature=0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert "".join(loaded.stream("def ", 20, seed=1, top_k=40, top_p=0.9)) == loaded.generate(
        "def ", 20, seed=1, top_k=40, top_p=0.9
    )


def test_generate_is_the_command_s(loaded, run):
    """The command writes the prompt and the same text."""
    done = script("generate.py", run.run_dir, "--prompt", "def ", "--max-new-tokens", 12, "--seed", 3)
    assert done.stdout == "def " + loaded.generate("def ", 12, seed=3) + "\n"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a " * 400}, "context of 16 tokens, got 4.*up to the model's 64"),
        ({"prompt": "a " * 400, "context": 64}, "context of 64 tokens, got 4.*max_seq_len= of moe_gpt.load"),
        ({"prompt": "a", "seed": 10**30}, r"seed must be a whole number from 0 to 2\^63 - 1, got 10+"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_generate_refuses_bad_arguments(loaded, options, wanted):
    """Each is an error that names it."""
    with pytest.raises(InputError, match=wanted):
        loaded.generate(**options)


def test_evaluate_takes_texts_and_files(loaded, tmp_path):
    """A text, a file with it, a Path, and a glob give the same loss; several texts are weighed by their tokens."""
    text = "def f(x):\n    return x + 1\n" * 30
    (tmp_path / "a.txt").write_text(text)
    expected = loaded.evaluate(text)
    assert expected == loaded.evaluate(str(tmp_path / "a.txt")) == loaded.evaluate(tmp_path / "a.txt")
    assert expected == loaded.evaluate(f"{tmp_path}/*.txt")
    both, other = loaded.evaluate([text, "The end."]), loaded.evaluate("The end.")
    total = expected.ce_loss * expected.n_tokens + other.ce_loss * other.n_tokens
    assert both.ce_loss == pytest.approx(total / (expected.n_tokens + other.n_tokens), rel=1e-5)
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": text}))
    assert loaded.evaluate(tmp_path / "a.jsonl", text_field="body") == expected


def test_route_is_a_table_of_every_choice(loaded):
    """A row for each token, layer and choice; the weights of a token's experts sum to 1; experts are those chosen."""
    table = loaded.route("def f(x):\n")
    n_tokens = len(loaded.encode("def f(x):\n"))
    assert list(table.columns) == ["position", "token", "layer", "choice", "expert", "weight"]
    assert len(table) == n_tokens * 3 * 2
    assert table["expert"].between(0, 3).all()
    sums = table.groupby(["position", "layer"])["weight"].sum()
    assert sums.to_numpy() == pytest.approx(1.0)
    text = table[(table["layer"] == 0) & (table["choice"] == 0)]["token"]
    assert "".join(text) == "def f(x):\n"
    _, routings = loaded.model.hidden_states(torch.tensor([loaded.encode("def f(x):\n")]))
    second = table[(table["layer"] == 1) & (table["choice"] == 1)]["expert"]
    assert second.tolist() == routings[1].expert_indices[:, 1].tolist()


def test_plot_of_routes_is_a_figure(loaded, tmp_path):
    """It has a cell for each token and layer, and can be saved."""
    figure = loaded.plot_route("def f($x$):\n")
    n_tokens = len(loaded.encode("def f($x$):\n"))
    assert len(figure.axes[0].texts) == 3 * n_tokens
    figure.savefig(tmp_path / "route.png")


def test_dense_model_has_no_routes(yaml_file, tmp_path):
    """The error says why."""
    dense = {"model.n_experts": 1, "model.top_k": 1}
    run = moe_gpt.train(yaml_file, dense, tmp_path, max_steps=1, say=lambda _: None)
    with pytest.raises(InputError, match="dense"):
        moe_gpt.load(run.run_dir).route("a")


def test_save_and_load_give_the_same_model(loaded, tmp_path):
    """A loaded model, and a model of one's own without a tokenizer, survive the way through a folder."""
    moe_gpt.save(loaded, tmp_path / "a")
    assert moe_gpt.load(tmp_path / "a").generate("def ", 12, seed=3) == loaded.generate("def ", 12, seed=3)
    model = tiny_model().eval()
    moe_gpt.save(model, tmp_path / "b")
    again = moe_gpt.load(tmp_path / "b", "cpu")
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(again.model(tokens).logits, model(tokens).logits)
    with pytest.raises(InputError, match="tokenizer"):
        again.generate("def ")


def test_run_of_train_can_be_saved(run, tmp_path):
    """With its tokenizer."""
    moe_gpt.save(run, tmp_path / "hf")
    assert moe_gpt.load(tmp_path / "hf").generate("def ", 5, seed=3) == moe_gpt.load(run.run_dir).generate(
        "def ", 5, seed=3
    )


@pytest.mark.parametrize("path", ["nothing/*.txt", "notes.txt", "a/b"])
def test_path_that_matches_nothing_is_not_scored_as_a_text(loaded, path):
    """The error says how to score it as a text."""
    with pytest.raises(InputError, match="matches no file"):
        loaded.evaluate(path)


def test_load_says_what_is_not_there(tmp_path):
    """A folder without a model is named, and so is a router that a Hugging Face folder cannot have."""
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        moe_gpt.load(tmp_path)
    moe_gpt.save(tiny_model(), tmp_path / "hf")
    with pytest.raises(InputError, match="make_router"):
        moe_gpt.load(tmp_path / "hf", make_router=moe_gpt.Router)


def test_read_run_gives_tables(run):
    """Metrics have a row for each step, evaluations one for each evaluation, with numbers in every column."""
    found = moe_gpt.read_run(run.run_dir)
    assert isinstance(found.metrics, pandas.DataFrame)
    assert found.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert found.metrics["ce_loss"].dtype == float
    assert found.evaluations["step"].tolist() == [0, 6]
    assert {"val/prose/ce_loss", "val/code/bits_per_byte"} <= set(found.evaluations.columns)
    assert found.config["model"]["n_layers"] == 3


def test_wrong_key_of_a_config_is_answered_with_the_nearest():
    """In Python as in YAML; and settings are given by name."""
    with pytest.raises(ConfigError, match=r"n_expert .*n_experts"):
        moe_gpt.ModelConfig(n_expert=4)
    with pytest.raises(ConfigError, match="by name"):
        moe_gpt.ModelConfig(4)


def test_signature_and_docstring_agree():
    """Every parameter of the public functions stands in the docstring."""
    for function in (moe_gpt.train, moe_gpt.load, moe_gpt.save, moe_gpt.LanguageModel.generate):
        for name in inspect.signature(function).parameters:
            assert name == "self" or f"{name}:" in function.__doc__


def test_train_says_what_a_limit_means_for_the_learning_rate(yaml_file, tmp_path):
    """As the command does."""
    said: list[str] = []
    moe_gpt.train(yaml_file, run_dir=tmp_path, max_steps=1, say=said.append)
    assert any("learning rate follows the whole schedule" in " ".join(text.split()) for text in said)
