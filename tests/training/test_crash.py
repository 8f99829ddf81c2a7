"""Killed at any instant and resumed, a run ends as if nothing had happened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).resolve().parents[1] / "crash_harness.py"


def torment(folder: Path, *arguments: object) -> str:
    """Run the harness in a process of its own, which forks the runs."""
    command = [sys.executable, str(HARNESS), str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kills(text: str) -> int:
    return sum(int(count) for count in re.findall(r"'kills': (\d+)", text))


@pytest.mark.slow
def test_killed_run_ends_as_if_it_had_not_been(tmp_path):
    """Two deaths, in a few seconds; weights, optimizer, generators and metrics are the same bytes."""
    text = torment(tmp_path, "--kills", 2, "--variants", 1, "--seed", 1, "--unit", 320)
    assert kills(text) >= 2
    assert "0 differences" in text


@pytest.mark.slow
def test_run_survives_many_deaths(tmp_path):
    """At least 60, inside saves and everywhere else, of three kinds of model."""
    text = torment(tmp_path, "--kills", 60)
    assert kills(text) >= 60
    assert text.count(" 0 differences") == 3
