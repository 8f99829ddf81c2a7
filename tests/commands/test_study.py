"""``moe-gpt study``: runs end to end, killed or not, alone or beside another one."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from run_scripts import ROOT, command

ARMS = {"dense": {"overrides": ["model.n_experts=1", "model.top_k=1", "model.d_ff=64"]}, "moe": {}}


@pytest.fixture
def study(small_values, tmp_path) -> Path:
    """The file of a study of two arms, whose runs take a second."""
    base = small_values | {"checkpoint": {"every_steps": 2}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    comparisons = [{"name": "mixture v dense", "arms": ["dense", "moe"], "claim": "lower"}]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "seeds": [0, 1], "arms": ARMS, "comparisons": comparisons}))
    return path


def start(*words: object) -> subprocess.Popen:
    """Start ``moe-gpt study run`` in a process."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "study.py"), "run", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def table_of(out: Path) -> list:
    """Return table.json without CPU times."""
    table = json.loads((out / "table.json").read_text())
    assert all(row.pop("cpu_seconds") > 0 for row in table["rows"])
    return table


def starts_of(run: Path) -> int:
    """Return how often a run was started from the beginning."""
    return (run / "events.jsonl").read_text().count('"kind": "start"')


@pytest.mark.slow
def test_study_from_one_command(study, tmp_path):
    """It trains, prints the tables and writes them; the second time there is nothing to do."""
    values = yaml.safe_load(study.read_text()) | {"seeds": [0], "arms": {"moe": {}}}
    del values["comparisons"]
    study.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    first = command("study", "run", study, "--out", out)
    assert first.returncode == 0, first.stderr
    assert re.search(r"1 run, 0 finished; 1 to train, 1 at once\nmoe-0 finished \(0 running, 0 waiting", first.stdout)
    assert re.search(r"arm +runs +prose +code +tokens.*\nmoe +1 of 1 ", first.stdout)
    names = ["table.md", "table.json", "study.html"]
    before = [(out / name).stat().st_mtime_ns for name in names]
    assert 'id="compare-cpu"' in (out / "study.html").read_text()
    second = command("study", "run", study, "--out", out)
    assert "1 run, 1 finished; nothing to train" in second.stdout
    assert [(out / name).stat().st_mtime_ns for name in names] == before
    assert command("study", "list", study, "--out", out).stdout.splitlines()[1].split()[:2] == ["moe-0", "finished"]


def test_list_prints_ordinary_commands(study, tmp_path):
    """One for each run, which says where it is, how it starts, and all that differs from the base."""
    values = yaml.safe_load(study.read_text())
    values["arms"]["later"] = {"init_from": "moe", "overrides": ["data.sources.0.prompt=a b"]}
    study.write_text(yaml.safe_dump(values))
    lines = command("study", "list", study, "--out", tmp_path / "out", "--commands").stdout.splitlines()
    assert len(lines) == 6
    words = shlex.split(lines[3])
    assert words[0] == "OMP_NUM_THREADS=1"
    assert words[-7:] == [
        "--run-dir", str(tmp_path / "out" / "later-1"), "--resume", "--init-from", str(tmp_path / "out" / "moe-1"),
        "data.sources.0.prompt=a b", "train.seed=1",
    ]  # fmt: skip


def test_bad_studies_end_with_status_2(study, tmp_path):
    """One line for each problem."""
    study.write_text("arms: {a: {sed: [1]}}\nbsae: tiny.yaml\n")
    found = command("study", "show", study)
    assert (found.returncode, found.stdout) == (2, "")
    assert {line.split()[1] for line in found.stderr.splitlines()} >= {"bsae", "arms.a.sed"}


@pytest.mark.slow
def test_commands_of_a_list_make_finished_runs(study, tmp_path):
    """Runs that were trained by hand are those of the study."""
    out = tmp_path / "out"
    for line in command("study", "list", study, "--out", out, "--commands").stdout.splitlines()[:2]:
        words = shlex.split(line)
        place = next(n for n, word in enumerate(words) if word in ("train",) or word.endswith("train.py"))
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *words[place + 1 :]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
    rows = command("study", "list", study, "--out", out).stdout.splitlines()[1:]
    assert [row.split()[1] for row in rows] == ["finished", "finished", "missing", "missing"]


@pytest.mark.slow
def test_failed_run_ends_with_status_1(study, tmp_path):
    """The others are trained, and the cause is shown."""
    values = yaml.safe_load(study.read_text())
    values["arms"]["moe"] = {"overrides": ["data.sources.0.files=nowhere"]}
    study.write_text(yaml.safe_dump(values))
    found = command("study", "run", study, "--out", tmp_path / "out")
    assert found.returncode == 1
    assert "moe-0 is failed: InputError: " in found.stdout
    assert re.search(r"dense +2 of 2", found.stdout)


@pytest.mark.slow
def test_killed_at_any_instant_the_tables_are_the_same(study, tmp_path):
    """Ten deaths, of the runner, of its workers, or of both; no run is lost or counted twice."""
    whole, out, random_ = tmp_path / "whole", tmp_path / "out", random.Random(0)
    assert start(study, "--out", whole).wait() == 0
    for number in range(10):
        process = start(study, "--out", out, "--jobs", 2)
        time.sleep(random_.uniform(2.0, 7.0))
        victims = children_of(process.pid) if number % 2 else [process.pid]
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if number % 2:
            process.kill()
        process.communicate()
    process = start(study, "--out", out, "--rerun", "failed")
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert table_of(out) == table_of(whole)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children()] if psutil.pid_exists(pid) else []


@pytest.mark.slow
def test_two_runners_share_the_runs(study, tmp_path):
    """No run is trained twice, and both end with the same table."""
    out = tmp_path / "out"
    both = [start(study, "--out", out, "--jobs", 2) for _ in range(2)]
    texts = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert [starts_of(out / f"{arm}-{seed}") for arm in ARMS for seed in (0, 1)] == [1] * 4
    assert all(re.search(r"dense +2 of 2", text) for text in texts)


@pytest.mark.slow
def test_interrupted_runs_are_saved(study, tmp_path):
    """Ctrl-C ends the workers too; the same command continues."""
    values = yaml.safe_load(study.read_text())
    values["overrides"] = ["data.sources.0.epochs=40", "schedule.stages.2.until_tokens=200000"]
    study.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    process = start(study, "--out", out, "--jobs", 1)
    while not list(out.glob("*/checkpoints/step_*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130
    assert "the same command continues" in text
    assert workers
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    log = next(out.glob("*.log")).read_text()
    assert "finishing this step and saving" in log
