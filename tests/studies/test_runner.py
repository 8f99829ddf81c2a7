"""Which run is started when, with workers that only say that they trained."""

from __future__ import annotations

import sys
import textwrap

import pytest

from moe_gpt.studies import runner as runner_module
from moe_gpt.studies.plan import load_study
from moe_gpt.studies.results import failure_of
from moe_gpt.studies.runner import Runner

SAYS = {
    "finished": "print(json.dumps('finished'), flush=True)",
    "dies": "os._exit(7)",
    "dies once": "marker = Path(task['folder'] + '.died'); marker.exists() or (marker.touch(), os._exit(7));"
    "print(json.dumps('finished'), flush=True)",
    "dies beside the other": "tries = 2 if Path(task['folder'] + '.died').exists() else 1;"
    "wait_for(2 * tries, 'runs were started'); Path(task['folder'] + '.died').touch(); tries == 1 and os._exit(7);"
    "print(json.dumps('finished'), flush=True)",
    "busy once": "marker = Path(task['folder'] + '.busy'); was = marker.exists(); marker.touch();"
    "print(json.dumps('finished' if was else 'busy'), flush=True)",
    "wild fails": "print(json.dumps('failed' if task['arm'] == 'wild' else 'finished'), flush=True)",
}


@pytest.fixture
def with_workers(monkeypatch, tmp_path):
    """Replace the workers by ones that do what they are told; the runs that they got are returned in order."""

    def replace(does: str):
        script = tmp_path / "worker.py"
        log = tmp_path / "log"
        log.touch()
        script.write_text(
            textwrap.dedent(f"""
            import json, os, sys, time
            from pathlib import Path
            def wait_for(lines, what):
                for _ in range(3000):
                    if len(Path({str(log)!r}).read_text().split()) >= lines:
                        return
                    time.sleep(0.01)
                raise TimeoutError(f"not {{lines}} {{what}} in 30 s")
            for line in sys.stdin:
                task = json.loads(line)
                with open({str(log)!r}, "a") as file:
                    print(Path(task["folder"]).name, file=file)
                with open({str(log)!r} + ".gpus", "a") as file:
                    print(os.environ.get("CUDA_VISIBLE_DEVICES", "none"), file=file)
                {SAYS[does]}
            """)
        )
        monkeypatch.setattr(runner_module, "_WORKER", [sys.executable, "-S", str(script)])
        monkeypatch.setattr(runner_module, "_SECONDS_UNTIL_BUSY_AGAIN", 0.05)
        monkeypatch.setattr(runner_module, "_SECONDS_A_TURN", 0.05)
        return lambda: log.read_text().split()

    return replace


def train(study, **options) -> tuple[Runner, list[str]]:
    """Train; return the runner and the names of the runs in the order in which they ended."""
    ended = []
    runner = Runner(study, **options)
    runner.train(lambda run: run and ended.append(run.name))
    return runner, ended


def test_longest_runs_are_first(write_study, tmp_path, with_workers):
    """By their FLOPs."""
    started = with_workers("finished")
    arms = {"short": {"overrides": ["model.n_layers=1"]}, "long": {"overrides": ["model.n_layers=3"]}, "moe": {}}
    runner, ended = train(load_study(write_study(arms=arms, seeds=[0], comparisons=None), tmp_path / "out"), jobs=1)
    assert started() == ended == ["long-0", "moe-0", "short-0"]
    assert runner.seconds_left == 0
    assert all(worker.process.returncode is not None for worker in runner.workers)


def test_arm_waits_for_the_one_that_it_starts_with(write_study, tmp_path, with_workers):
    """Although it is longer; where that one fails, it is not started."""
    started = with_workers("wild fails")
    arms = {
        "wild": {"overrides": ["model.n_layers=1"]},
        "after": {"init_from": "wild"},
        "moe": {"overrides": ["optimizer.lr=1e-3"]},
        "later": {"init_from": "moe", "overrides": ["model.n_layers=3"]},
    }
    runner, _ = train(load_study(write_study(arms=arms, seeds=[0], comparisons=None), tmp_path / "out"), jobs=2)
    assert sorted(started()) == ["later-0", "moe-0", "wild-0"]
    assert runner.states == {"wild-0": "failed", "after-0": "waiting", "moe-0": "finished", "later-0": "finished"}


@pytest.mark.parametrize("does", ["dies once", "busy once"])
def test_run_gets_another_try(write_study, tmp_path, with_workers, does):
    """Where its process died, or where another process trained it."""
    started = with_workers(does)
    runner, ended = train(load_study(write_study(arms={"moe": {}}, comparisons=None), tmp_path / "out"), jobs=2)
    assert sorted(started()) == ["moe-0", "moe-0", "moe-1", "moe-1"]
    assert sorted(ended) == ["moe-0", "moe-1"]
    assert {*runner.states.values()} == {"finished"}


@pytest.mark.parametrize(
    ("does", "starts"), [("finished", ["3", "5"]), ("dies beside the other", ["3", "3", "5", "5"])]
)
def test_each_gpu_gets_one_run(write_study, tmp_path, with_workers, monkeypatch, does, starts):
    """Of those that the process may use, by their own names; the GPU of a worker that died is used again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(runner_module.torch.cuda, "device_count", lambda: 2)
    with_workers(does)
    runner, _ = train(load_study(write_study(arms={"moe": {}}, comparisons=None), tmp_path / "out"))
    gpus = (tmp_path / "log.gpus").read_text().split()
    assert {*runner.states.values()} == {"finished"}
    assert sorted(gpus) == starts


def test_run_whose_process_dies_twice_has_failed(write_study, tmp_path, with_workers):
    """The file beside its folder says so."""
    study = load_study(write_study(arms={"moe": {}}, seeds=[0], comparisons=None), tmp_path / "out")
    with_workers("dies")
    runner, ended = train(study)
    assert (ended, runner.states) == (["moe-0"], {"moe-0": "failed"})
    assert failure_of(study.runs[0]).read_text() == "its process died twice, with exit status 7"


def test_nothing_starts_after_the_last_minute(write_study, tmp_path, with_workers):
    """A runner whose time is over starts nothing."""
    started = with_workers("finished")
    runner, ended = train(load_study(write_study(), tmp_path / "out"), minutes=1e-9)
    assert (started(), ended, {*runner.states.values()}) == ([], [], {"waiting"})


def test_held_out_run_waits_for_its_prediction(write_study, tmp_path, with_workers):
    """It starts once the file is there."""
    started = with_workers("finished")
    arms = {name: {"overrides": [f"model.n_layers={n}"]} for n, name in enumerate("abcde", 1)}
    law = {"ladder": list("abcd"), "held_out": "e"}
    study = load_study(write_study(arms=arms, seeds=[0], comparisons=None, law=law), tmp_path / "out")
    train(study, jobs=1)
    assert started() == ["d-0", "c-0", "b-0", "a-0"]
    study.prediction.write_text("{}")
    train(study, jobs=1)
    assert "e-0" in started()
