"""Training beside busy processes: what is measured, and the bound on spinning that is set before torch loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_config

from moe_gpt.bench.busy import bench_busy, loaded_runtime
from moe_gpt.bench.contenders import Workload

SHOW = "import os, moe_gpt; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "20000 1"),
        ({"GOMP_SPINCOUNT": "7"}, "7 1"),
        ({"KMP_BLOCKTIME": "200"}, "20000 200"),
        ({"OMP_WAIT_POLICY": "passive"}, "None None"),
    ],
)
def test_waiting_threads_spin_for_a_bounded_time(given, expected):
    """Unless the user has said how threads wait."""
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    environment = {**clean, "PYTHONPATH": str(Path(__file__).parents[2]), **given}
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.slow
@pytest.mark.parametrize(("others_train", "kind"), [(False, "spinning"), (True, "training")])
def test_steps_are_counted_alone_and_beside(others_train, kind):
    """Both in processes of their own, which tell the runtime of threads."""
    said: list[str] = []
    work = Workload(tiny_config(vocab_size=64), 2, 16, "cpu", "fp32", 32)
    alone, beside = bench_busy(work, 1, seconds=1, rounds=1, say=said.append, others_train=others_train)
    assert alone["steps_per_second"] > 0
    assert beside["steps_per_second"] > 0
    assert any(f"1 {kind} processes" in text for text in said)


def test_runtime_is_named():
    """Torch brings one."""
    assert "lib" in loaded_runtime() or "OpenMP" in loaded_runtime()
