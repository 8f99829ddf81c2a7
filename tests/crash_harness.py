"""Kill a training process again and again, resume it, and compare it with one that was never interrupted.

    python tests/crash_harness.py FOLDER [--kills 40] [--seed 0]

Every life is a process of its own that trains for real (``set_up_run``, ``open_run_folder``, ``train``); it is
forked from one that has already imported torch, which saves seconds a life, and killed with SIGKILL at a random
instant, or at a random call of the functions that touch the disk: inside a save, a pruning, the writing of metrics, or
the tokenising of a source. Saves are slowed down, so that instants inside them are likely. At the end weights,
optimizer, random generators and metrics must be those of the uninterrupted run, byte for byte (but for the speed
that metrics name).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # by every optimizer; imported before the lives begin

from moe_gpt.config import RunConfig
from moe_gpt.data.builtin_corpus import iterate_builtin
from moe_gpt.training.display import Silent
from moe_gpt.training.loop import Limits, train
from moe_gpt.training.records.metrics import read_metrics
from moe_gpt.training.saving.listing import list_checkpoints
from moe_gpt.training.saving.run_folder import open_run_folder
from moe_gpt.training.saving.store import prune
from moe_gpt.training.setup import set_up_run

VARIANTS = {
    "balance by loss, accumulation": {},
    "balance by bias, noise, capacity": {"balance": "bias", "router_noise": 0.1, "capacity_factor": 1.0},
    "dense": {"n_experts": 1, "top_k": 1},
}
_DISK_CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "truncate")


def make_config(corpus: Path, model: dict, unit: int) -> RunConfig:
    """A run in three stages, 12 units long, with a checkpoint every third step and an evaluation every eighth."""
    return RunConfig.from_mapping(
        {
            "model": {"n_layers": 2, "d_model": 32, "n_heads": 2, "head_dim": 16, "d_ff": 32, "n_experts": 4}
            | {"max_seq_len": 64}
            | model,
            "data": {
                "tokenizer": {"vocab_size": 400},
                "validation_fraction": 0.2,
                "validation_tokens": 512,
                "sources": [
                    {"name": "prose", "files": str(corpus / "prose_*.txt"), "epochs": 1},
                    {"name": "code", "files": str(corpus / "code_*.txt"), "epochs": 2, "prompt": "def "},
                ],
            },
            "schedule": {
                "stages": [
                    {"until_tokens": 2 * unit, "seq_len": 16, "batch_tokens": 128},
                    {"until_tokens": 6 * unit, "seq_len": 32, "batch_tokens": [128, 384]},
                    {"until_tokens": 12 * unit, "seq_len": 64, "batch_tokens": 384},
                ],
                "warmup_tokens": 512,
            },
            "train": {"micro_batch_tokens": 192, "log_every_steps": 2, "eval_every_steps": 8, "sample_tokens": 4},
            "checkpoint": {"every_steps": 3, "keep_last": 2, "keep_every_steps": 12},
        }
    )


def write_corpus(folder: Path) -> None:
    """A few pages of the built-in corpus as files."""
    folder.mkdir(parents=True)
    for kind, count in (("prose", 12), ("code", 6)):
        for number, document in zip(range(count), iterate_builtin(kind), strict=False):
            (folder / f"{kind}_{number:02d}.txt").write_text(document.text[:6000], encoding="utf-8")


def live(config: RunConfig, run_dir: Path, cache: Path, die_at_call: int | None = None) -> int:
    """Return the id of a new process that trains until the run has ended."""
    pid = os.fork()
    if pid:
        return pid
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os.environ["XDG_CACHE_HOME"] = str(cache)
        torch.set_num_threads(1)
        _slow_and_deadly_disk(die_at_call)
        run = set_up_run(config, run_dir, torch.device("cpu"), resume=True)
        with open_run_folder(run_dir, run.identity, run.resumed_from, run.damaged):
            if run.is_finished:
                prune(run_dir, config.checkpoint)
            else:
                train(run, Limits(), Silent())
        os._exit(0)
    except BaseException:
        import traceback

        (run_dir.parent / "failure.txt").write_text(traceback.format_exc())
        os._exit(9)


def _slow_and_deadly_disk(die_at_call: int | None) -> None:
    """Slow down what touches the disk, and kill this process at the n-th such call, before or after it."""
    calls = [0]

    def wrapped(real):
        def call(*arguments, **named):
            calls[0] += 1
            time.sleep(0.001)
            if calls[0] == die_at_call:
                if calls[0] % 2:
                    real(*arguments, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in _DISK_CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


def outcome(run_dir: Path) -> tuple[list[dict], dict[str, bytes]]:
    """What a run left: metrics without the speed, and the files of every checkpoint."""
    metrics = [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "cpu_seconds")}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]
    files = {
        f"{path.name}/{file.name}": file.read_bytes() for path in list_checkpoints(run_dir) for file in path.iterdir()
    }
    return metrics, files


def compare(whole: Path, killed: Path) -> list[str]:
    """Return what differs between two finished runs; nothing is what is promised."""
    (metrics, files), (other_metrics, other_files) = outcome(whole), outcome(killed)
    problems = [] if metrics == other_metrics else ["metrics.jsonl differs"]
    problems += [f"{name} is only in one of them" for name in sorted(files.keys() ^ other_files.keys())]
    both = sorted(files.keys() & other_files.keys())
    problems += [f"{name} differs" for name in both if files[name] != other_files[name]]
    problems += [f"{path} was left behind" for path in sorted(killed.rglob("*.tmp-*"))]
    return problems


def torment(config: RunConfig, folder: Path, n_kills: int, rng: random.Random) -> tuple[Counter, list[str]]:
    """Kill and resume until the run has ended after at least ``n_kills`` deaths, in as many runs as that takes.

    Returns:
        counts of what happened, and what differed from the uninterrupted run.
    """
    counts, problems = Counter(), []
    whole = folder / "whole"
    began = time.monotonic()
    _, status = os.waitpid(live(config, whole, folder / "cache"), 0)
    assert status == 0, (folder / "failure.txt").read_text()
    life = time.monotonic() - began
    while counts["kills"] < n_kills:
        run_dir = folder / f"killed-{counts['runs']}"
        cache = Path(tempfile.mkdtemp(dir=folder))  # empty, so that tokenising is interrupted too
        counts["runs"] += 1
        while True:
            dies_inside = rng.random() < 0.6
            pid = live(config, run_dir, cache, rng.randrange(1, 200) if dies_inside else None)
            if not dies_inside:
                time.sleep(rng.random() * life)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                counts["kills"] += 1
                counts["at a disk call" if dies_inside else "at a random instant"] += 1
                continue
            if status:
                problems.append((folder / "failure.txt").read_text())
                return counts, problems
            break
        found = compare(whole, run_dir)
        problems += [f"{run_dir.name}: {problem}" for problem in found]
        problems += [f"{path} was left behind" for path in sorted(cache.rglob("*.tmp-*"))]
        shutil.rmtree(cache)
    return counts, problems


def main() -> int:
    """Run all variants and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unit", type=int, default=1024, help="tokens; a multiple of 64, a run has 12 (default: 1024)")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="how many kinds of model")
    arguments = parser.parse_args()
    rng, failed = random.Random(arguments.seed), False
    write_corpus(arguments.folder / "corpus")
    variants = list(VARIANTS.items())[: arguments.variants]
    for name, model in variants:
        folder = arguments.folder / name.partition(",")[0].replace(" ", "-")
        config = make_config(arguments.folder / "corpus", model, arguments.unit)
        counts, problems = torment(config, folder, -(-arguments.kills // len(variants)), rng)
        print(f"{name}: {dict(counts)}, {len(problems)} differences", flush=True)
        for problem in problems:
            print(f"  {problem}")
        failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
