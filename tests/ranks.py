"""Small runs on several processes: they train the same cases one after another, as torchrun would start them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_gpt.config import RunConfig
from moe_gpt.model.router import Router, Routing

Cases = dict[str, dict[str, Any]]
"""By name: ``values`` of the config, limits, ``resume``, ``spoil``: what is broken on purpose, and ``volumes``: whether
routing is even, and rank 0 writes what it sends in the last step into ``volumes.json`` of the run folder."""


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
    for status, output in finish(start(size, __file__, str(path)), 60 + 15 * len(cases)):
        assert status == 0, output
    return json.loads(path.with_suffix(".ended").read_text())


def _train(config: RunConfig, run_dir: Path, case: dict[str, Any]) -> str:
    from small_runs import CPU

    from moe_gpt.api.training import train_to_the_end
    from moe_gpt.post_training.stages import stage_of
    from moe_gpt.training.loop import Limits
    from moe_gpt.training.setup import NOTHING_OWN, OwnParts, set_up_run

    own = OwnParts(make_router=EvenRouter) if case.get("volumes") else NOTHING_OWN
    start = {"resume": case.get("resume", False), "init_from": case.get("init_from")}
    run = set_up_run(config, run_dir, CPU, **start, say=lambda text: None, own=own, stage=stage_of(config))
    with counting_bytes() if case.get("volumes") else contextlib.nullcontext({}) as sent:
        ended = train_to_the_end(run, Limits(**case.get("limits", {})))[0]
    if sent and run.team.is_main:
        (run_dir / "volumes.json").write_text(json.dumps(sent))
    return ended


class EvenRouter(Router):
    """Sends equally many tokens to each expert."""

    def forward(self, x: torch.Tensor) -> Routing:
        """Choose experts one after another."""
        routing = super().forward(x)
        chosen = torch.arange(routing.expert_indices.numel()).view_as(routing.expert_indices)
        return routing._replace(expert_indices=chosen % routing.router_probs.shape[1])


@contextlib.contextmanager
def counting_bytes() -> Iterator[dict[str, float]]:
    """Give what this rank sends in the last training step, in bytes by kind, where collectives are rings."""
    import moe_gpt.training.loop as loop

    sent: dict[str, float] = {}
    of_step: dict[str, float] = {}

    def counted(kind: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            given = [*arguments, *options.values()]
            n = dist.get_world_size(next((a for a in given if isinstance(a, dist.ProcessGroup)), None))
            whole = max(a.nbytes for a in given if isinstance(a, torch.Tensor))
            shares = {"send": 1, "all_reduce": 2 * (n - 1) / n}
            sent[kind] = sent.get(kind, 0) + whole * shares.get(kind, (n - 1) / n)
            return real(*arguments, **options)

        return call

    def anew(*arguments: Any, **options: Any) -> Any:
        sent.clear()
        result = train_step(*arguments, **options)
        of_step.update(sent)
        return result

    train_step, kinds = (
        loop.train_step,
        {
            "all_gather": ("all_gather_single", "all_gather_into_tensor"),
            "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
            "all_reduce": ("all_reduce",),
            "broadcast": ("broadcast",),
            "send": ("isend",),
            "all_to_all": ("all_to_all_single",),
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", anew)
        for kind, names in kinds.items():
            for name in names:
                if hasattr(dist, name):
                    patch.setattr(dist, name, counted(kind, getattr(dist, name)))
        yield of_step


def _spoil(what: str) -> None:
    """Break something on purpose."""
    import errno

    import moe_gpt.training.saving.store as store
    import moe_gpt.training.saving.write as write
    import moe_gpt.training.step as step
    from moe_gpt.distributed.process import is_another_rank

    if what == "local counts":
        step._sum_counts = lambda team, weight, counts: counts

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "full disk, gathered":
        store.write_checkpoint = fail
    if what == "full disk, sharded" and is_another_rank():
        write.write_pieces = fail


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
