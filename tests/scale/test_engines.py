"""Options of engines, and Slurm as far as programs that stand in for it go."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from scale.corpora import config_of, stores, write_corpus

from moe_gpt.data.prepare import prepare_data
from moe_gpt.errors import InputError

pytest.importorskip("datatrove", reason="needs moe_gpt[scale]")

from moe_gpt.scale import engines  # noqa: E402
from moe_gpt.scale.engines import make_engine  # noqa: E402
from moe_gpt.scale.prepare import prepare_at_scale  # noqa: E402

SLURM = ("partition=cpu", "time=1:30:00")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local", ("worker=2",), r"KEY=VALUE with a key of local: workers; got 'worker=2'"),
        ("local", ("workers",), "KEY=VALUE"),
        ("local", ("tasks=3",), "KEY=VALUE"),
        ("local", ("workers=0",), "--engine-option workers must be a whole number from 1 .*, got 0"),
        ("ray", ("mem_per_cpu_gb=much",), "--engine-option mem_per_cpu_gb must be a number above 0, got 'much'"),
        ("ray", ("ray_remote_kwargs=3",), "must be a mapping, got 3"),
        ("slurm", (), "needs --engine-option partition="),
        ("slurm", ("partition=cpu",), "needs --engine-option time="),
    ],
)
def test_wrong_options_are_named(name, options, message):
    """An option that the executor does not have, and one that it lacks, are errors."""
    with pytest.raises(InputError, match=message):
        make_engine(name, options)


def test_slurm_needs_sbatch(monkeypatch):
    """Without sbatch on the PATH, the error says where to run the command."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="needs sbatch on the PATH"):
        make_engine("slurm", SLURM)


def test_values_are_yaml_and_times_are_text():
    """workers=4 is a number; 1:30:00 stays a text, which Slurm reads."""
    assert make_engine("local", ("workers=4",)).options == {"workers": 4}
    assert make_engine("ray", ("mem_per_cpu_gb=0.5",)).options == {"mem_per_cpu_gb": 0.5}


STAND_INS = {
    "sbatch": """
import itertools, json, os, re, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
script = Path(sys.argv[-1]).read_text()
jobs = json.loads((here / "jobs.json").read_text()) if (here / "jobs.json").exists() else []
name = re.search("job-name=(.*)", script)[1]
jobs.append([*sys.argv[1:-1], *re.findall("#SBATCH (.*)", script)])
(here / "jobs.json").write_text(json.dumps(jobs))
first, last = re.search(r"--array=(\\d+)-(\\d+)", script).groups()
(here / "script.sh").write_text(script)
for task in range(int(first), int(last) + 1):
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here", "RUN_OFFSET": "0"}
    subprocess.run(["bash", str(here / "script.sh")], env=environment, capture_output=True)
print("Submitted batch job", len(jobs))
""",
    "srun": """
import subprocess, sys
sys.exit(subprocess.run(sys.argv[sys.argv.index("-n") + 2 :]).returncode)
""",
    "scontrol": "print('here')\n",
    "squeue": "import os, pathlib\nprint((pathlib.Path(__file__).parent / 'queue').read_text())\n",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs that stand in for Slurm's: sbatch runs a job at once, task after task."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in STAND_INS.items():
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(engines.__file__).parents[2]))
    return folder


@pytest.mark.slow
def test_slurm_jobs_prepare_the_same_bytes(slurm, tmp_path):
    """The jobs that datatrove submits, run by programs that stand in for Slurm's, write the bytes of one process."""
    sources = write_corpus(tmp_path)[:1]
    prepare_data(config_of(sources, tmp_path / "plain"), say=lambda _: None)
    config = config_of(sources, tmp_path / "scaled")
    first = prepare_at_scale(config, make_engine("slurm", SLURM), 3, lambda _: None)
    assert stores(tmp_path / "scaled") == stores(tmp_path / "plain")
    assert len(first.jobs) == 2
    jobs = json.loads((slurm / "jobs.json").read_text())
    assert {"--partition=cpu", "--time=1:30:00", "--array=0-2"} <= set(jobs[0])
    merge = next(job for job in jobs if "--array=0-0" in job and any("dependency=afterok:1" in word for word in job))
    assert merge
    again = prepare_at_scale(config, make_engine("slurm", SLURM), 3, lambda _: None)
    assert again.jobs == []
    assert [summary.n_documents for summary in again.summaries] == [80]


def test_refused_jobs_are_an_error(slurm, tmp_path):
    """If sbatch refuses a job, the command ends with one line, and sbatch's own message."""
    (slurm / "sbatch").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such partition')\n")
    config = config_of(write_corpus(tmp_path)[:1], tmp_path / "scaled")
    with pytest.raises(InputError, match=r"sbatch refused a job \(status 1\)"):
        prepare_at_scale(config, make_engine("slurm", SLURM), 3, lambda _: None)


@pytest.mark.slow
def test_failed_slurm_tasks_are_told_and_submitted_again(slurm, tmp_path):
    """The next call says why tasks failed, and submits only these; while jobs run, it submits nothing."""
    sources = write_corpus(tmp_path)[:1]
    config = config_of(sources, tmp_path / "scaled")
    prepare_data(config_of(sources, tmp_path / "plain"), say=lambda _: None)
    said, engine = [], make_engine("slurm", SLURM)
    real = (slurm / "sbatch").read_text()
    (slurm / "sbatch").write_text(real.replace("range(int(first), int(last) + 1)", "range(1)"))
    jobs = prepare_at_scale(config, engine, 3, said.append).jobs
    assert not stores(tmp_path / "scaled")
    (slurm / "queue").write_text("\n".join(jobs))
    assert prepare_at_scale(config, engine, 3, said.append).jobs == jobs
    (slurm / "queue").write_text("")
    (slurm / "sbatch").write_text(real)
    (slurm / "jobs.json").unlink()
    said.clear()
    prepare_at_scale(config, engine, 3, said.append)
    assert [text for text in said if text.startswith("lines, merge, task 0 failed: FileNotFoundError")]
    assert "--array=0-1" in json.loads((slurm / "jobs.json").read_text())[0]
    assert stores(tmp_path / "scaled") == stores(tmp_path / "plain")
