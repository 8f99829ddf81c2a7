"""The answer: twelve lines that a tired engineer reads once."""

from __future__ import annotations

import dataclasses
import re

import pytest

from moe_gpt.config.yaml import CONFIGS, load_run_config
from moe_gpt.errors import InputError
from moe_gpt.plan.answer import answer
from moe_gpt.plan.hardware import GPUS, Gpu, Parallelism
from moe_gpt.plan.options import Failures, PlanOptions
from moe_gpt.plan.plan import describe, plan_run
from moe_gpt.plan.training_cost import training_work

H100 = GPUS["h100"]
CPU = Gpu("cpu", 8e9, 2e11, 2e10, 2e10, 2e10, "measured", cores=2)
BUSY = dataclasses.replace(CPU, load=26.0)
OPEN = "schedule.stages.2.until_tokens=null"
LIMITS = ["data.sources.0.max_tokens=1_000_000", "data.sources.1.max_tokens=2_000_000"]  # 1 and 2 epochs


def answered(name: str = "small", overrides: tuple | list = (), **options: object) -> dict[str, str]:
    """Return the lines of an answer by their heading, having checked their number and width."""
    config, given = load_run_config(name, list(overrides)), PlanOptions(**({"gpu": H100} | options))
    text = answer(config, given, plan_run(config, given))
    assert len(text.splitlines()) <= 12
    assert max(map(len, text.splitlines())) <= 80
    rows = re.sub(r"\n {2,}", " ", text).splitlines()
    return {heading: row for heading, row in (re.split(r" +", row, maxsplit=1) for row in rows)}


def test_answer_has_time_cost_memory_and_what_was_assumed():
    """Of eight H100: one duration, its price, the memory of each against what it has, the guess by its name."""
    rows = answered(layout=Parallelism(8), price=2.5)
    assert list(rows) == ["Training", "Time", "Memory", "moe_gpt", "Assumed", "More"]
    assert re.fullmatch(r"at most 12.2 minutes on 8 h100, \$4.05 at \$2.50 per GPU hour", rows["Time"])
    assert re.fullmatch(r"[\d.]+ GB, and each GPU has 80 GB: fits", rows["Memory"])
    assert "40 % of the peak (MFU" in rows["Assumed"]
    assert re.search(r"a guess .*--mfu.* high for d_model 768", rows["Assumed"])
    assert "high" not in answered("gpt4")["Assumed"]
    assert "guess" not in answered(mfu=0.3)["Assumed"]


def test_answer_says_what_moe_gpt_itself_takes():
    """It trains on one device: eight times the time of eight, or too little memory."""
    assert "one device: at most 97.2 minutes" in answered(layout=Parallelism(8))["moe_gpt"]
    assert "does not fit" in answered("gpt4", layout=Parallelism(120, 8, 15))["moe_gpt"]


def test_answer_of_a_cpu_has_cores_and_hours():
    """No dollars, nodes or GPUs; 14 % of the peak at the width of tiny.yaml, not 40."""
    rows = answered("tiny", gpu=CPU)
    assert re.fullmatch(r"[\d.]+ minutes on 2 cores", rows["Time"])
    assert "14 %" in rows["Assumed"]
    assert not re.search(r"\$|node|GPU", " ".join(rows.values()))
    assert "Busy" not in rows
    assert "26" in answered("tiny", gpu=BUSY)["Busy"]


def test_tables_of_a_cpu_have_no_dollars_nodes_and_gpus():
    """Nor failures of a cluster and messages between its members; of GPUs nothing is left out."""
    config, options = load_run_config("tiny"), PlanOptions(gpu=BUSY)
    sections = plan_run(config, options)
    text = describe(sections, options)
    rows = re.sub(r"\n  note: .*(\n      .*)*", "", text)
    assert not re.search(r"\$|\bnode|GPU|failures|communication", rows)
    assert "This machine is busy" in text
    everything = describe(sections)
    assert all(f"{section.name}.{q.name}" in everything for section in sections for q in section.quantities)


def test_warnings_of_the_plan_are_in_the_answer():
    """Idle ranks, failures, what does not fit and what to change, what else was asked."""
    reported = {"gpu": GPUS["a100-80gb"], "layout": Parallelism(25_000, 8, 15), "mfu": 0.34}
    rows = answered("gpt4", **reported, duration_seconds=1e7, budget=1e6)
    assert re.match(r"1,470 expected; .*123 days and \$73", rows["Failures"])
    assert re.search(r"116 days needs MFU .* %. \$1 million buys .* tokens", rows["Asked"])
    assert "Use fewer" in answered("tiny", layout=Parallelism(1000))["Idle"]
    rows = answered(gpu=dataclasses.replace(H100, memory_bytes=12e9))
    assert "does not fit" in rows["Memory"]
    assert rows["Advice"].startswith("Change first: ")
    assert "never ends" in answered(failures=Failures(gpu_hours_between=1e-6))["Failures"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("gpu", [H100, BUSY, dataclasses.replace(H100, memory_bytes=1)], ids=["h100", "cpu", "full"])
def test_answer_is_short(path, gpu):
    """At most twelve lines of 80 columns, whatever is asked and goes wrong; ``answered`` counts."""
    failures = Failures(gpu_hours_between=1)
    answered(str(path), gpu=gpu, layout=Parallelism(1000), duration_seconds=1e9, budget=1e9, failures=failures)
    answered(str(path), gpu=gpu)


def test_open_schedule_takes_what_the_sources_give():
    """max_tokens times epochs of every source, as an upper bound that is called one; given tokens are not."""
    assert training_work(load_run_config("small")).tokens == 2_500_000_000
    rows = answered("tiny", [OPEN, *LIMITS])
    assert rows["Training"].endswith("at most 5M tokens")
    assert "max_tokens" in rows["Assumed"]
    config = load_run_config("tiny", [OPEN, *LIMITS])
    assert any("max_tokens" in note for note in plan_run(config, PlanOptions(gpu=H100))[1].notes)
    assert "at most" not in " ".join(answered("tiny", [OPEN, *LIMITS], tokens=4e6).values())


@pytest.mark.parametrize("limits", [[], LIMITS[:1]])
def test_open_schedule_without_a_bound_is_refused(limits):
    """Where a source has no max_tokens, its size is not known."""
    with pytest.raises(InputError, match="until_tokens is null.*--tokens"):
        training_work(load_run_config("tiny", [OPEN, *limits]))
