"""Evaluation and generation know how long the sequences of training were, and special tokens in prompts."""

from __future__ import annotations

import json

import pytest
from run_scripts import command
from small_runs import change, run_training

import moe_gpt
from moe_gpt.commands import generate
from moe_gpt.commands.generate import GenerateOptions, find_prompt
from moe_gpt.errors import InputError


@pytest.fixture(scope="module")
def run_dir(small_values, tmp_path_factory):
    """A run that was stopped after stages of 16 and 32 positions; the model has 64."""
    values = json.loads(json.dumps(small_values))
    values["data"]["tokenizer"]["special_tokens"] = ["<|im_start|>"]
    folder = tmp_path_factory.mktemp("context") / "run"
    run_training(moe_gpt.config.RunConfig.from_mapping(values), folder, max_steps=12)
    return folder


def test_files_are_evaluated_at_the_length_of_training(run_dir, corpus_dir):
    """A longer context is given on purpose, with a warning."""
    files = str(corpus_dir / "prose_00.txt")
    done = command("evaluate", run_dir, "--files", files)
    assert "the window has 32 tokens" in done.stderr
    assert "WARNING" not in done.stderr
    longer = command("evaluate", run_dir, "--files", files, "--context", 64)
    assert "trained on at most 32 positions" in longer.stderr
    assert longer.stdout != done.stdout
    beyond = ("--context", 65)
    for words in (("evaluate", run_dir, "--files", files, *beyond), ("generate", run_dir, "--prompt", "The ", *beyond)):
        refused = command(*words)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "WARNING" not in refused.stderr
        assert "from 1 to the model's 64 tokens, got 65; or load the model with more: --max-seq-len" in refused.stderr
        assert command(*words, "--max-seq-len", 65).returncode == 0


def test_held_out_text_is_evaluated_at_the_length_of_training(run_dir):
    """Without a word; a longer context warns."""
    assert "WARNING" not in command("evaluate", run_dir, "--by-position").stderr
    assert "trained on at most 32 positions" in command("evaluate", run_dir, "--context", 64).stderr


def test_generation_ends_at_the_length_of_training(run_dir):
    """Again a longer context is possible, and warned of."""
    done = command("generate", run_dir, "--prompt", "The ", "--max-new-tokens", 60)
    assert "stopped: the context of 32 tokens is full" in done.stderr
    longer = command("generate", run_dir, "--prompt", "The ", "--max-new-tokens", 60, "--context", 64)
    assert "trained on at most 32 positions" in longer.stderr
    assert longer.stdout.startswith(done.stdout.rstrip("\n\ufffd"))


def test_length_of_a_run_whose_later_stages_never_began(small_config, tmp_path):
    """It is that of the stages that were trained."""
    run_training(small_config, tmp_path / "run", max_steps=2)
    assert moe_gpt.load(tmp_path / "run").context == 16


def test_special_tokens_in_a_prompt(run_dir):
    """They are text unless asked for, and the note says how to ask."""
    loaded = moe_gpt.load(run_dir)
    spelled = "<|im_start|>a"
    assert len(loaded.encode(spelled)) > 2
    assert loaded.encode(spelled, special_tokens=True)[0] == loaded.tokenizer.special_id("<|im_start|>")
    assert loaded.encode(spelled, special_tokens=True)[1:] == loaded.encode("a")
    arguments = ["generate", run_dir, "--prompt", spelled, "--max-new-tokens", 4]
    assert "--special-tokens" in command(*arguments).stderr
    assert "--special-tokens" not in command(*arguments, "--special-tokens").stderr


@pytest.mark.filterwarnings("always:the tokenizer loses text")
def test_tokenizer_that_loses_text_is_warned_of(run_dir, corpus_dir, tmp_path):
    """Where files are evaluated, and where a prompt is continued; what is read back whole is not mentioned."""
    files, prompt = ("evaluate", "--files", str(corpus_dir / "prose_00.txt")), ("generate", "--prompt", "The ")
    for name, *words in (files, prompt):
        assert "loses text" not in command(name, run_dir, *words).stderr
    folder = tmp_path / "exported"
    moe_gpt.save(moe_gpt.load(run_dir), folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"normalizer": {"type": "Lowercase"}}), "utf-8")
    for name, *words in (files, prompt):
        assert "warning: the tokenizer loses text" in command(name, folder, *words).stderr


def test_seeds_repeat_and_differ(run_dir):
    """The same seed gives the same text, another another; a seed out of range is refused by its flag."""
    words = ["generate", run_dir, "--prompt", "The ", "--temperature", 1.5, "--seed"]
    first, again, other = (command(*words, seed).stdout for seed in (3, 3, 4))
    assert first == again != other
    for seed in (-1, 2**64):
        refused = command(*words, seed)
        assert refused.returncode == 2
        assert "--seed" in refused.stderr


def test_weights_that_are_not_finite_are_one_line(small_config, tmp_path):
    """Sampling says so at the command, and training goes on past its samples."""
    config = change(small_config, "optimizer", lr=1e30)
    config = change(config, "train", eval_every_steps=2)
    config = change(config, "faults", max_skips_in_a_row=100)
    run_training(config, tmp_path / "run", max_steps=6)
    model = moe_gpt.load(tmp_path / "run")
    model.model.output.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        model.generate("a")


def test_model_card_names_the_length_of_training(run_dir, tmp_path):
    """The exported context stays that of the model."""
    assert command("export", run_dir, tmp_path / "hf").returncode == 0
    assert "sequences of at most 32 tokens" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 64
    assert moe_gpt.load(tmp_path / "hf").context == 64


def test_a_prompt_file_is_read_up_to_a_limit(tmp_path, monkeypatch):
    """More is never read, as of a file of 1 TB with holes or of a device; what has the limit's length is the prompt."""
    path = tmp_path / "prompt"
    with open(path, "wb") as file:
        file.truncate(10**12)
    with pytest.raises(InputError, match="--prompt-file .*prompt must have at most 10,000,000 characters"):
        find_prompt(GenerateOptions(prompt_file=path))
    monkeypatch.setattr(generate, "_LONGEST_PROMPT", 4)
    path.write_bytes("\ufeffé\r\nab".encode())
    assert find_prompt(GenerateOptions(prompt_file=path)) == "é\nab"
    path.write_bytes(b"abcde")
    with pytest.raises(InputError, match="at most 4 characters"):
        find_prompt(GenerateOptions(prompt_file=path))
