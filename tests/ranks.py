"""Small runs on several processes: they train the same cases one after another, as torchrun would start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_gpt.config import RunConfig

Cases = dict[str, dict[str, Any]]
"""By name: ``values`` of the config, limits, ``resume``, and ``spoil``: what is broken on purpose."""


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what torchrun would set, and one thread."""
    here = Path(__file__).resolve()
    paths = os.pathsep.join([str(here.parents[1]), str(here.parents[0]), os.environ.get("PYTHONPATH", "")])
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return (
        os.environ | {name: str(value) for name, value in own.items()} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    )


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(size: int, *words: str) -> list[subprocess.Popen]:
    """Start so many processes of one group."""
    port = free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen([sys.executable, *words], env=variables(rank, size, port), **pipes) for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 60) -> list[tuple[int, str]]:
    """Return each process's status and output; kill those that take too long."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def train_cases(cases: Cases, size: int, folder: Path) -> dict[str, str]:
    """Train each case on so many processes, in ``folder/<name>``; return how each ended."""
    folder.mkdir(exist_ok=True)
    path = folder / f"cases-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(cases))
    for status, output in finish(start(size, __file__, str(path))):
        assert status == 0, output
    return json.loads(path.with_suffix(".ended").read_text())


def _train(config: RunConfig, run_dir: Path, case: dict[str, Any]) -> str:
    from small_runs import CPU

    from moe_gpt.api.training import train_to_the_end
    from moe_gpt.training.loop import Limits
    from moe_gpt.training.setup import set_up_run

    run = set_up_run(config, run_dir, CPU, resume=case.get("resume", False), say=lambda text: None)
    return train_to_the_end(run, Limits(**case.get("limits", {})))[0]


def _spoil(what: str) -> None:
    """Break something on purpose."""
    import errno

    import moe_gpt.training.saving.store as store
    import moe_gpt.training.step as step

    if what == "local counts":
        step._sum_counts = lambda team, weight, counts: counts
    if what == "full disk":

        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        store.write_checkpoint = fail


def _main(path: Path) -> None:
    from moe_gpt.distributed.process import is_another_rank, leave
    from moe_gpt.training.recovery import TrainingStopped

    ended = {}
    for name, case in json.loads(path.read_text()).items():
        config = RunConfig.from_mapping(case["values"])
        _spoil(case.get("spoil", ""))
        try:
            ended[name] = _train(config, path.parent / case.get("folder", name), case)
        except TrainingStopped as stopped:
            ended[name] = f"stopped: {stopped}"
    text = json.dumps(ended)
    if not is_another_rank():
        path.with_suffix(".ended").write_text(text)
    print(text)
    leave()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
