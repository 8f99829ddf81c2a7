"""Output that goes away: training never loses its state by it, and other commands say so by their exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import steps

from moe_gpt.training.saving.listing import list_checkpoints

REPOSITORY = Path(__file__).resolve().parents[2]


def start(*words: object, **options) -> subprocess.Popen:
    """Start ``moe-gpt``."""
    command = [sys.executable, "-m", "moe_gpt", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, text=True, **options)


def readerless() -> int:
    """Return the writing end of a pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.slow
@pytest.mark.parametrize("broken", ["reader gone", "disk full"])
def test_training_goes_on_without_its_output(small_yaml, tmp_path, broken):
    """The run finishes, every step is recorded, the last one is saved; a warning on stderr says what was lost."""
    out = readerless() if broken == "reader gone" else os.open("/dev/full", os.O_WRONLY)
    process = start("train", small_yaml, "--run-dir", tmp_path / "run", stdout=out, stderr=subprocess.PIPE)
    os.close(out)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0
    assert errors.count("warning: stdout is lost") == 1
    assert "Traceback" not in errors
    recorded = [line["step"] for line in steps(tmp_path / "run")]
    assert recorded == list(range(1, len(recorded) + 1))
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step_{recorded[-1]:08d}"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_other_commands_say_by_their_status_what_happened():
    """141 where the reader is gone, as SIGPIPE would; 2 and a line where the disk is full or stdout is closed."""
    words = ["plan", "tiny.yaml", "--all"]
    out = readerless()
    for given in (words, ["--help"], ["train", "--help"], ["--version"]):
        assert start(*given, stdout=out, stderr=subprocess.DEVNULL).wait(timeout=60) == 141
    os.close(out)
    with open("/dev/full", "w") as full:
        process = start(*words, stdout=full, stderr=subprocess.PIPE)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors.count("error: "), "Traceback" in errors) == (2, 1, False)
    closed = start(*words, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert (closed.communicate(timeout=60)[1], closed.returncode) == ("error: Bad file descriptor: stdout\n", 2)
