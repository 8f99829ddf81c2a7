"""The plan as a whole: every section, for every config; JSON alone; bad input in a line."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import subprocess

import pytest
from run_scripts import script

from moe_gpt.config.yaml import CONFIGS, load_run_config
from moe_gpt.plan.hardware import Parallelism, find_gpu
from moe_gpt.plan.options import Failures, PlanOptions
from moe_gpt.plan.plan import describe, plan_run
from moe_gpt.plan.quantities import catalogue, to_json
from moe_gpt.plan.scaling_laws import extrapolate

REPORTED = ["--config", "gpt4.yaml", "--n-gpus", "25000", "--tensor", "8", "--pipeline", "15", "--mfu", "0.34"]


def plan_script(*arguments: str) -> subprocess.CompletedProcess:
    """Run scripts/plan.py."""
    return script("plan.py", *arguments)


def options(**changes) -> PlanOptions:
    """Return those of one A100."""
    return PlanOptions(**({"gpu": find_gpu("a100-80gb"), "tokens": 1e9} | changes))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_plan(path):
    """Each number has a name of its own in its section, a formula and a source, and can be shown."""
    sections = plan_run(load_run_config(str(path)), options(duration_seconds=1e6, budget=1e4))
    assert len({section.name for section in sections}) == len(sections)
    for section in sections:
        names = [quantity.name for quantity in section.quantities]
        assert len(set(names)) == len(names)
        assert all(q.formula and q.source and q.label and q.shown() for q in section.quantities)
    text = describe(sections)
    assert "parameters.total" in text
    assert {"mfu_from_duration", "tokens_from_budget", "memory", "communication"} <= set(to_json(sections))


def test_every_word_of_the_file_is_used():
    """quantities.yaml has no number and no note that no plan shows."""
    a100, h100, gpt4, tiny = find_gpu("a100-80gb"), find_gpu("h100"), load_run_config("gpt4"), load_run_config("tiny")
    reported = options(layout=Parallelism(25_000, 8, 15, zero=0), serving=Parallelism(300, 8, 16), tokens=None)
    far = dataclasses.replace(reported, batch=4096, context=40_000, duration_seconds=1, budget=1)
    cpu = dataclasses.replace(h100, name="cpu", memory_bytes=1, load=1)
    sharing = load_run_config("tiny", ["model.attention_sharing=2"])
    plans = [
        plan_run(gpt4, far),
        plan_run(gpt4, options(layout=Parallelism(6, expert=2), failures=Failures(gpu_hours_between=1e-6))),
        plan_run(tiny, options(layout=Parallelism(1000))),
        plan_run(tiny, options(gpu=cpu)),
        plan_run(load_run_config("small"), options(tokens=None)),
        plan_run(sharing, options(gpu=a100)),
        [extrapolate()],
    ]
    sections = [section for found in plans for section in found]
    names = {f"{section.name}.{q.name}" for section in sections for q in section.quantities}
    notes = {f"{section.name}: {note}" for section in sections for note in section.notes}
    for key, section in catalogue().sections.items():
        for name in section.quantities:
            assert fnmatch.filter(names, f"{section.name or key}.{name}"), f"{key}.{name}"
        for name, text in section.notes.items():
            pattern = re.escape(f"{section.name or key}: ") + re.sub(r"\\{.*?\\}", ".*", re.escape(text))
            assert any(re.fullmatch(pattern, note) for note in notes), f"{key}.notes.{name}"


def test_reported_system():
    """JSON alone on stdout, in base units, with the reports' totals."""
    done = plan_script(*REPORTED, "--json")
    assert done.stderr == ""
    plan = json.loads(done.stdout)
    assert plan["parameters"]["total"] == pytest.approx(1831e9, rel=0.01)
    assert plan["parameters"]["active"] == pytest.approx(280e9, rel=0.01)
    assert plan["parameters"]["attention"] == pytest.approx(55.8e9, rel=0.01)
    assert plan["compute"]["six_n_d"] == pytest.approx(2.15e25, rel=0.02)
    assert plan["compute"]["cost"] == pytest.approx(57e6, rel=0.01)
    assert plan["memory"]["weights_average"] == pytest.approx(30.5e9, rel=0.01)
    assert plan["kv_cache"]["per_token_this_model"] == 61_440
    assert "25,000 GPUs = 208 x 120 + 40" in plan.pop("notes")["compute"][0]
    assert not any(
        isinstance(value, str) and value[0].isdigit() for section in plan.values() for value in section.values()
    )


def test_number_can_be_questioned():
    """--explain says how it is computed and where from."""
    done = plan_script(*REPORTED, "--explain", "compute.six_n_d")
    assert done.returncode == 0
    assert "21.75 YFLOP" in done.stdout
    assert "formula: " in done.stdout
    assert "source: " in done.stdout


def test_forecast_of_2020():
    """Every input is printed and can be another."""
    forecast = json.loads(plan_script("--extrapolate", "--json").stdout)["forecast"]
    assert forecast["parameters"] == pytest.approx(175e9**2 / 1.5e9)
    other = json.loads(plan_script("--extrapolate", "--json", "--set", "gpt3_parameters=1e11").stdout)["forecast"]
    assert other["parameters"] == pytest.approx(1e22 / 1.5e9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*REPORTED, "--n-gpus", "100"],
            "n_gpus must be at least tensor x pipeline x expert = 8 x 15 x 1 = 120, got 100",
        ),
        (
            [*REPORTED, "--serve-gpus", "100"],
            "--serve-gpus, --serve-tensor, --serve-pipeline: n_gpus must be at least tensor x pipeline",
        ),
        ([*REPORTED, "--tensor", "5"], "model.n_heads=168 must be a multiple of tensor, got tensor=5"),
        ([*REPORTED, "--pipeline", "7"], "model.n_layers=120 must be a multiple of pipeline, got pipeline=7"),
        ([*REPORTED, "--gpu", "h900"], "there is no GPU 'h900'; choose one of a100-40gb"),
        ([*REPORTED, "--mfu", "-1"], "mfu"),
        ([*REPORTED, "--mfu", "34"], "at most 1 (34 % is 0.34), got 34"),
        ([*REPORTED, "--price", "0"], "price"),
        ([*REPORTED, "--zero", "5"], '"5" for --zero'),
        ([*REPORTED, "--tokens", "0"], "tokens"),
        ([*REPORTED, "--days", "-3"], "--days"),
        ([*REPORTED, "--gpu-hours-between-failures", "0"], "--gpu-hours-between-failures"),
        ([*REPORTED, "--acceptance", "2"], "acceptance"),
        ([*REPORTED, "--explain", "totl"], "nearest: "),
        ([*REPORTED, "--set", "a=1"], "--set is for --extrapolate"),
        (["--extrapolate", "--set", "gpt5=1"], "there is no input 'gpt5'; choose one of "),
        (["--extrapolate", "--set", "gpt3_parameters=many"], "gpt3_parameters must be a number above 0, got 'many'"),
        (["--extrapolate", "--set", "gpt3_parameters=-1"], "gpt3_parameters"),
        (["--json"], "CONFIG is missing"),
        ([*REPORTED, "--tokens", "0.3"], "tokens must be from 1 to 1e+20, got 0.3"),
        ([*REPORTED, "--tokens", "1e308"], "tokens must be from 1 to 1e+20"),
        ([*REPORTED, "--gamma", "1000000000"], "gamma must be a whole number from 0 to 1000"),
        ([*REPORTED, "--explain", "total", "--json"], "--json"),
        (["--extrapolate", "--config", "gpt4.yaml"], "--extrapolate takes no config"),
        (["--extrapolate", "--set", "compute_exponent=1e-9"], "too large to compute"),
        (["--config", "tiny.yaml", "schedule.stages.2.until_tokens=null"], "give the tokens to plan for (--tokens)"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    """Status 2, the value, what would be right; nothing on stdout."""
    done = plan_script(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_more_gpus_than_work_is_said():
    """Where ranks have no micro-batch, duration and cost are out of reach."""
    sections = plan_run(load_run_config("tiny"), options(layout=Parallelism(1000)))
    (compute,) = [section for section in sections if section.name == "compute"]
    assert compute.notes[0].startswith("1,000 ranks share 32 micro-batches, so some ranks idle")
