"""Kill ranks of runs on several processes, resume, and compare with runs that were never disturbed.

    python tests/kill_ranks.py FOLDER [--kills 40] [--seed 0] [--sizes 2,4]

torchrun starts every run. A random rank is killed with SIGKILL at a random instant, and torchrun must end the others
within the time-out of their group. Half of the runs are then resumed by a new torchrun; in the other half torchrun goes
on by itself (``--max-restarts``). In the end weights, optimizer, random generators and metrics must be those of an
undisturbed run of the same layout, byte for byte (but for the speed that metrics name). Some of the runs write shards.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from crash_harness import compare, make_config, write_corpus

from moe_gpt.config.yaml import to_plain

LAYOUTS = {2: ({"zero": 1}, {"expert": 2}, {"tensor": 2}), 4: ({"expert": 2}, {"replicate": 2}, {"tensor": 2})}
TIMEOUT = 20
"""Seconds that a rank waits for another."""


def write_configs(folder: Path, size: int) -> list[Path]:
    """Write a config for each layout of so many ranks."""
    paths = []
    for number, parallel in enumerate(LAYOUTS[size]):
        values = to_plain(make_config(folder / "corpus", {}, 1024))
        values["parallel"] |= parallel | {"timeout_seconds": TIMEOUT}
        values["checkpoint"] |= {"format": ("gathered", "sharded")[number % 2]}
        values["data"]["cache_dir"] = str(folder / "cache")
        values["train"] |= {"report": False, "sample_tokens": 0, "record_tokens": 0}
        paths.append(folder / f"{size}-{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(values))
    return paths


def start(config: Path, run_dir: Path, size: int, restarts: int = 0) -> subprocess.Popen:
    """Start torchrun for a run or its resumption."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    words = ["-m", "moe_gpt", "train", str(config), "--run-dir", str(run_dir), "--resume"]
    with open(run_dir.with_suffix(".log"), "a") as log:
        return subprocess.Popen([sys.executable, *torchrun, *words], env=os.environ | own, stdout=log, stderr=log)


def kill_one(torchrun: subprocess.Popen, rng: random.Random) -> list[psutil.Process]:
    """Kill a random rank, and return the others; none if there are no ranks now."""
    try:
        ranks = psutil.Process(torchrun.pid).children()
        victim = rng.choice(ranks)
        victim.kill()
    except (psutil.Error, IndexError):
        return []
    return [rank for rank in ranks if rank != victim]


def seconds_until_gone(processes: list[psutil.Process]) -> float:
    """Return how long processes go on."""
    began = time.monotonic()
    _, alive = psutil.wait_procs(processes, TIMEOUT + 60)
    assert not alive, f"{alive} went on after another rank was killed"
    return time.monotonic() - began


def torment(config: Path, size: int, run_dir: Path, life: float, rng: random.Random) -> tuple[int, float]:
    """Kill ranks, twice on average, and let the run end; return how many died, and the longest that others went on."""
    by_itself, n_kills, slowest = rng.random() < 0.5, 0, 0.0
    torchrun = start(config, run_dir, size, restarts=20 if by_itself else 0)
    while True:
        time.sleep(rng.random() * life)
        others = kill_one(torchrun, rng) if n_kills == 0 or rng.random() < 0.5 else []
        if not others:
            break
        slowest, n_kills = max(slowest, seconds_until_gone(others)), n_kills + 1
        if not by_itself:
            torchrun.wait(60)
            torchrun = start(config, run_dir, size)
    assert torchrun.wait(900) == 0, run_dir.with_suffix(".log").read_text()[-4000:]
    return n_kills, slowest


def main() -> int:
    """Kill, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", default="2,4")
    arguments = parser.parse_args()
    rng, sizes, problems = random.Random(arguments.seed), [int(n) for n in arguments.sizes.split(",")], []
    folder = arguments.folder.absolute()
    write_corpus(folder / "corpus")
    for size in sizes:
        n_kills, slowest = 0, 0.0
        whole: dict[Path, tuple[Path, float]] = {}
        configs = write_configs(folder, size)
        while n_kills < arguments.kills / len(sizes):
            config = configs[n_kills % len(configs)]
            if config not in whole:
                began = time.monotonic()
                assert start(config, config.with_suffix(".whole"), size).wait(900) == 0
                whole[config] = config.with_suffix(".whole"), time.monotonic() - began
            undisturbed, life = whole[config]
            run_dir = config.with_suffix(f".killed-{n_kills}")
            n, longest = torment(config, size, run_dir, life, rng)
            n_kills, slowest = n_kills + n, max(slowest, longest)
            problems += [f"{run_dir.name}: {problem}" for problem in compare(undisturbed, run_dir)]
        print(f"{size} processes: {n_kills} kills, others went on for at most {slowest:.1f} s", flush=True)
    print(f"{len(problems)} differences", *problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
