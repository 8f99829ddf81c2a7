"""How fast the arms of a study train: the CPU time of steps that take turns, each arm in a process of its own.

The runs of a study share a machine and slow each other down by chance, so their times are no measurement. Here one step
at a time is taken, round-robin, on one thread and random tokens, and arms are compared within a round.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from moe_gpt.bench.contenders import Ours, Workload, workload_of
from moe_gpt.bench.rounds import require, take_turns
from moe_gpt.config import RunConfig
from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.studies.plan import Study
from moe_gpt.studies.statistics import LEVEL

_WARMUP = 3


def write_speeds(study: Study, arms: Sequence[str], rounds: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure arms in turns and write speeds.json, which the tables then have; return what it has.

    Args:
        study: as it is planned.
        arms: the first one is the one that the others are held against.
        rounds: steps of each arm, 2 or more.
        say: told which arm fails, and why.

    Raises:
        InputError: for an arm that the study lacks, or that does not run.
    """
    works = {run.arm: _workload(run.config) for run in reversed(study.runs)}
    if unknown := set(arms) - works.keys():
        raise InputError(f"arms must be among {', '.join(study.config.arms)}, got {', '.join(sorted(unknown))}")
    if min(rounds, len(set(arms))) < 2:
        raise InputError(f"a comparison needs two arms and two rounds, got {len(set(arms))} and {rounds}")
    turns = take_turns(arms, functools.partial(_stepper, works), rounds, 1, _WARMUP, at_once=True, say=say)
    for arm in arms:
        require(turns, arm)
    told = compare_speeds({arm: np.array(turns[arm].values) / works[arm].batch_tokens for arm in arms})
    study.out.mkdir(parents=True, exist_ok=True)
    replace_file(study.speeds, json.dumps(told, indent=2) + "\n")
    return told


def compare_speeds(seconds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return median and speed of each arm, with the 95 % t interval of the logarithm over rounds.

    Args:
        seconds: CPU seconds of a token by arm (rounds,); the speed is that of the first arm's time over its own.
    """
    first = next(iter(seconds.values()))
    told = {}
    for arm, values in seconds.items():
        logs = np.log(first / values)
        low, high = stats.ttest_1samp(logs, 0).confidence_interval(LEVEL) if np.ptp(logs) else (logs[0], logs[0])
        told[arm] = {
            "cpu_seconds_per_token": float(np.median(values)),
            "speed": float(np.exp(logs.mean())),
            "interval": [float(np.exp(low)), float(np.exp(high))],
            "rounds": len(values),
        }
    return told


def _workload(config: RunConfig) -> Workload:
    """Return the largest batch of the last stage, in the run's micro-batches and with its optimizer."""
    work = workload_of(config, torch.device("cpu"), "fp32")
    micro = min(config.train.micro_batch_tokens, work.batch_tokens)
    return dataclasses.replace(work, micro_batch_tokens=micro, optimizer=config.optimizer)


def _stepper(works: Mapping[str, Workload], arm: str) -> Callable[[], float]:
    contender = Ours(works[arm])
    torch.set_num_threads(1)

    def step() -> float:
        started = time.process_time()
        contender.step()
        return time.process_time() - started

    return step
