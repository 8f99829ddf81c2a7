"""The scripts as a user runs them."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_scripts import ROOT, script, script_in_a_process
from tiny_models import tiny_model

from moe_gpt.interop import hugging_face


@pytest.fixture(scope="module")
def run_dir(small_values, tmp_path_factory) -> Path:
    """A run of eight steps made by the script."""
    import yaml

    folder = tmp_path_factory.mktemp("scripts")
    (folder / "small.yaml").write_text(yaml.safe_dump(small_values), encoding="utf-8")
    arguments = ["--config", folder / "small.yaml", "--run-dir", folder / "run", "--max-steps", 8]
    done = script_in_a_process("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder / "run"


def test_train_says_what_it_does(run_dir):
    """Parameters, stages, device, evaluations, samples and what to run next; plain lines, no control characters."""
    text = (run_dir.parent / "stdout.txt").read_text()
    for expected in ("active per token", "top-2", "until", "cpu", "fp32", "validation at step 0", "bits_per_byte"):
        assert expected in text
    assert "--- prose ---\nThe " in text
    assert "--- code ---\ndef " in text
    assert "scripts/generate.py " in text
    assert "\r" not in text
    assert "\x1b" not in text


def test_train_resumes_and_says_when_it_is_finished(run_dir):
    """--resume goes on to the end; on a finished run it says so and exits 0."""
    arguments = ["--config", run_dir.parent / "small.yaml", "--run-dir", run_dir, "--resume"]
    assert script("train.py", *arguments).returncode == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 27))
    again = script("train.py", *arguments)
    assert (again.returncode, again.stderr) == (0, "")
    assert "this run is finished" in again.stdout


def test_train_on_an_existing_run_exits_2(run_dir):
    """One line on stderr, status 2, nothing changed."""
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = script("train.py", "--config", run_dir.parent / "small.yaml", "--run-dir", run_dir)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "already holds a run" in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_interrupted_training_saves_and_says_how_to_resume(small_yaml, tmp_path):
    """SIGINT: status 130, a checkpoint, and the command that goes on."""
    command = [sys.executable, ROOT / "scripts/train.py", "--config", small_yaml, "--run-dir", tmp_path / "run"]
    command += ["schedule.stages.2.until_tokens=6144000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    metrics = tmp_path / "run" / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))


def test_generate_prints_prompt_and_text_only(run_dir):
    """Stdout starts with the prompt; notes are on stderr; a seed repeats."""
    arguments = [run_dir, "--prompt", "def ", "--max-new-tokens", 12]
    first, second = (script("generate.py", *arguments, "--seed", 3) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert first.stdout == second.stdout
    assert "step_" not in first.stdout
    assert "step_" in first.stderr


def test_evaluate_prints_a_row_per_source(run_dir):
    """Loss, perplexity and bits per byte for each source; the loss is the run's last evaluation."""
    done = script("evaluate.py", run_dir)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert set(rows) == {"source", "prose", "code"}
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(rows["code"][2]) == pytest.approx(last["val/code/ce_loss"], abs=1e-4)


def test_export_then_generate_gives_the_same_text(run_dir, tmp_path):
    """Also from a single checkpoint, in bfloat16, and with a licence and the run's scores in the model card."""
    done = script("export.py", run_dir, tmp_path / "a", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert "MixtralForCausalLM, float32" in done.stdout
    arguments = ["--prompt", "def ", "--max-new-tokens", 12, "--seed", 3]
    texts = [script("generate.py", folder, *arguments).stdout for folder in (run_dir, tmp_path / "a")]
    assert texts[0] == texts[1]
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "A mixture-of-experts (4 per layer, top-2) decoder of " in card
    assert "decoder decoder" not in card
    scores = next(json.loads(s) for s in reversed((run_dir / "metrics.jsonl").read_text().splitlines()) if "val/" in s)
    assert f"| code | {scores['val/code/ce_loss']:.4f} |" in card
    assert str(run_dir.parent) not in card  # nobody's folders are published
    checkpoint = next((run_dir / "checkpoints").iterdir())
    assert script("export.py", checkpoint, tmp_path / "b", "--dtype", "bfloat16").returncode == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < 0.6 * sizes[0]


def test_train_starts_from_a_hugging_face_folder(run_dir, tmp_path):
    """The error says which settings the folder needs; with them it trains on, and resumes without the folder."""
    script("export.py", run_dir, tmp_path / "hf")
    arguments = [
        "--config",
        run_dir.parent / "small.yaml",
        "--run-dir",
        tmp_path / "run",
        "--init-from",
        tmp_path / "hf",
    ]
    refused = script("train.py", *arguments)
    assert refused.returncode == 2
    advice = next(line for line in refused.stderr.splitlines() if ", add: " in line)
    overrides = shlex.split(advice.partition("add: ")[2])
    assert f'data.tokenizer.file="{tmp_path}/hf/tokenizer.json"' in overrides
    assert script("train.py", *arguments, *overrides, "--max-steps", 2).returncode == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = script("evaluate.py", run_dir).stdout.splitlines()[1].split()
    assert metrics[0]["val/prose/ce_loss"] == pytest.approx(float(trained[2]), abs=1e-3)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        file.unlink()
    assert script("train.py", *arguments, *overrides, "--max-steps", 3, "--resume").returncode == 0


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("generate.py", ["{run}", "--prompt", "word " * 200], "shorter than the context of 64 tokens"),
        ("generate.py", ["{run}", "--prompt", ""], "must have at least one token"),
        (
            "generate.py",
            ["{run}", "--prompt", "a", "--top-p", "1.5"],
            "a number above 0 and at most 1, got 1.5",
        ),
        ("generate.py", ["{run}", "--prompt", "a", "--device", "tpu"], "got 'tpu'"),
        ("generate.py", ["{tmp}/nothing", "--prompt", "a"], "no complete checkpoint at"),
        ("evaluate.py", ["{tmp}/nothing"], "no complete checkpoint at"),
        ("train.py", ["--config", "nothing.yaml"], "no config at nothing.yaml"),
        (
            "train.py",
            ["--config", "{tmp}/small.yaml", "--run-dir", "{tmp}/x", "model.n_layer=3"],
            "did you mean n_layers",
        ),
        ("train.py", ["--config", "{tmp}/small.yaml", "--run-dir", "/proc/no/such"], "/proc/no"),
        ("train.py", ["--config", "{tmp}/small.yaml", "--run-dir", "{tmp}/x", "--device", "cuda:99"], "is not there"),
        (
            "train.py",
            ["--config", "{tmp}/small.yaml", "--run-dir", "{tmp}/x", "--init-from", "{tmp}"],
            "a folder of runs",
        ),
        ("export.py", ["{run}", "{run}"], "output folder must be new or empty"),
        ("export.py", ["{tmp}/nothing", "{tmp}/x"], "no complete checkpoint at"),
        ("export.py", ["{hf}", "{tmp}/x"], "is a Hugging Face folder"),
        ("export.py", ["{run}", "{tmp}/x", "--dtype", "int8"], '"int8" for --dtype'),
        ("export.py", ["{run}", "{tmp}/x", "--license", "a\nb"], "must be an identifier such as apache-2.0"),
        ("generate.py", ["{hf}", "--prompt", "a"], "architectures must name one of MixtralForCausalLM"),
    ],
)
def test_bad_input_is_one_clear_line(run_dir, name, arguments, expected):
    """Status 2, the problem on stderr without a traceback, nothing on stdout that looks like a result."""
    foreign = run_dir.parent / "foreign"
    if not foreign.exists():
        hugging_face.save(tiny_model(), foreign)
        (foreign / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    filled = [argument.format(run=run_dir, tmp=run_dir.parent, hf=foreign) for argument in arguments]
    done = script(name, *filled)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_dir.parent / "x").exists()


def test_prepare_data_shows_sources_and_sequences(small_yaml, tmp_path):
    """A row per source with shares that sum to one, and what the first sequences of each stage say."""
    done = script("prepare_data.py", "--config", small_yaml, "--show", f"data.cache_dir={tmp_path / 'cache'}")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.startswith(("prose", "code"))}
    assert sum(float(row[5].rstrip("%")) for row in rows.values()) == pytest.approx(100, abs=0.2)
    documents = int(rows["code"][1]) + int(rows["prose"][1])
    assert documents in (18, 19)  # one may be cut in two, where the hash leaves a split empty
    assert float(rows["code"][6]) / float(rows["prose"][6]) == pytest.approx(2, rel=0.05)
    headings = [line for line in done.stdout.splitlines() if line.startswith("--- token ")]
    assert len(headings) == 6
    assert headings[0].startswith("--- token 0, 16 tokens: ")
    again = script("prepare_data.py", "--config", small_yaml, f"data.cache_dir={tmp_path / 'cache'}")
    assert "tokenising" in done.stdout
    assert "tokenising" not in again.stdout
    assert "--- token" not in again.stdout


def test_evaluate_scores_any_file(run_dir, tmp_path):
    """The same from the run and from its export; the stride changes the context, and belongs to --files."""
    (tmp_path / "a.txt").write_text((ROOT / "moe_gpt" / "files" / "durable.py").read_text())
    script("export.py", run_dir, tmp_path / "hf")
    values = []
    for model, *more in ((run_dir,), (tmp_path / "hf",), (run_dir, "--stride", 64), (run_dir, "--stride", 4)):
        done = script("evaluate.py", model, "--files", tmp_path / "a.txt", *more)
        assert done.returncode == 0, done.stderr
        values.append(float(done.stdout.splitlines()[1].split()[-1]))
    assert values[0] == values[1]
    assert values[2] != values[3]
    assert script("evaluate.py", run_dir, "--stride", 4).returncode == 2


@pytest.mark.slow
def test_finished_run_is_tidied(run_dir, tmp_path):
    """A checkpoint that a process killed at the very end did not prune goes when the run is resumed again."""
    folder = tmp_path / "run"
    arguments = ["--config", run_dir.parent / "small.yaml", "--run-dir", folder, "checkpoint.keep_last=1"]
    assert script("train.py", *arguments).returncode == 0
    (newest,) = (folder / "checkpoints").iterdir()
    older = shutil.copytree(newest, newest.with_name("step_00000008"))
    state = json.loads((older / "state.json").read_text()) | {"step": 8, "score": None}
    (older / "state.json").write_text(json.dumps(state))
    assert "this run is finished" in script("train.py", *arguments, "--resume").stdout
    assert list((folder / "checkpoints").iterdir()) == [newest]
