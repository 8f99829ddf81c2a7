"""The processes of a run: what torchrun's variables say, the group, and how its ranks agree.

A process alone makes no group.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import datetime
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt.config import RunConfig
from moe_gpt.distributed.layout import Layout, plan_layout
from moe_gpt.errors import InputError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_FOR_THREADS = 0.3
"""Threads of gloo let go of the last collective's tensors after it has ended, for which they need the interpreter. A
process whose interpreter ends before that is aborted."""
_AGREEMENTS = itertools.count()
Value = TypeVar("Value")
Number = TypeVar("Number", int, float)


class _NobodyCame(InputError):
    """The processes did not meet, so that rank 0 may not say it."""


class _ToldByMain(InputError):
    """An error that rank 0 has, too, and says."""


class Launch(NamedTuple):
    """What torchrun's variables say."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


ALONE = Launch(0, 1, 0, "", 0)


def read_launch(variables: Mapping[str, str]) -> Launch:
    """Return what the variables say; ``ALONE`` without them, also where Slurm's are set.

    Raises:
        InputError: naming the variable that is missing or wrong.
    """
    if not {"RANK", "WORLD_SIZE"} & variables.keys():
        return ALONE
    given = [f"{name}={variables[name]}" for name in _VARIABLES if name in variables]
    missing = [name for name in _VARIABLES if name not in variables]
    if missing:
        raise InputError(
            f"{' '.join(given)} is set in the environment without {', '.join(missing)}; start with torchrun, which "
            "sets all of them, or unset them for a single process"
        )
    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    rank, size, local_rank, port = (_number({"LOCAL_RANK": variables["RANK"], **variables}, name) for name in numbers)
    if rank >= size:
        raise InputError(f"RANK must be below WORLD_SIZE={size}, got {rank}; start with torchrun, or unset both")
    return Launch(rank, size, local_rank, variables["MASTER_ADDR"], port)


def _number(variables: Mapping[str, str], name: str) -> int:
    if not variables[name].isdecimal():
        raise InputError(f"{name} in the environment must be a whole number, got {variables[name]!r}; unset it")
    return int(variables[name])


def is_another_rank() -> bool:
    """Whether this process is one of several and not the one that prints."""
    with contextlib.suppress(InputError):
        return read_launch(os.environ).rank > 0
    return False


def should_tell(error: InputError) -> bool:
    """Whether a rank other than 0 must show an error itself. All of them have those before the group is there."""
    return isinstance(error, _NobodyCame) or (dist.is_initialized() and not isinstance(error, _ToldByMain))


def is_lost_rank(error: Exception) -> bool:
    """Whether an error of a collective says that another rank is gone or late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class Team:
    """Ranks that train together.

    What only the host knows is agreed by the store, whatever the time that rank 0 takes. Agreements are numbered for
    the whole life of the process, because the store keeps them.
    """

    def __init__(self, launch: Launch, layout: Layout, store: Any) -> None:
        self.rank, self.size, self.layout = launch.rank, launch.size, layout
        self._launch, self._store, self._agreements = launch, store, _AGREEMENTS
        if store:
            ranks = torch.arange(layout.world).view(layout.pipeline, layout.data, layout.tensor)
            self._mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("pipeline", "data", "tensor"))

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of the rows this rank reads, of ``layout.data`` parts."""
        return self.rank // self.layout.tensor % self.layout.data

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's device of that kind."""
        if device.type == "cuda":
            device = torch.device("cuda", self._launch.local_rank)
            torch.cuda.set_device(device)
        elif device.type != "cpu":
            raise InputError(f"several processes train on cpu or cuda, got --device {device.type}")
        return device

    def sum(self, tensor: Tensor, over: Literal["data", "pipeline", "world"] = "data") -> Tensor:
        """Return the sum over data ranks, which read different rows, over a pipeline's stages, or over all ranks."""
        if getattr(self.layout, over) == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=None if over == "world" else self._mesh.get_group(over))
        return total

    def largest(self, numbers: list[Number]) -> list[Number]:
        """Return the largest of all ranks' numbers at each place; the host knows them, so no device is waited for."""
        found = torch.tensor(numbers)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def from_main(self, action: Callable[[], Value]) -> Value:
        """Return what the action returns on rank 0, which alone does it: JSON's values. All raise its error."""
        return self.all_of(action, by=[0])[0]

    def main_first(self, action: Callable[[], Value]) -> Value:
        """Return what the action returns here; the other ranks wait until rank 0 has done it."""
        result: list[Value] = []
        self.from_main(lambda: result.append(action()))
        return result[0] if self.is_main else action()

    def all_of(self, action: Callable[[], Value], by: Sequence[int] = ()) -> list[Value]:
        """Return what the action returns on each of some ranks, by default on all: JSON's values.

        If it fails on any of them, all ranks raise that error.
        """
        number, ranks = next(self._agreements), by or range(self.size)
        if self.rank in ranks:
            self._publish(f"agreement/{number}/{self.rank}", action)
        return [self._read(f"agreement/{number}/{rank}") for rank in ranks]

    def together(self, action: Callable[[], Value]) -> Value:
        """Return what the action returns here; if it fails on any rank, all raise that error."""
        result: list[Value] = []
        self.all_of(lambda: result.append(action()))
        return result[0]

    def in_another_thread(self, name: str) -> Team:
        """Return a team for agreements in another thread, in any order on each rank. Its name must be new each time."""
        other = copy.copy(self)
        other._agreements = itertools.count()
        other._store = dist.PrefixStore(name, self._store)
        return other

    def _publish(self, key: str, action: Callable[[], Any]) -> None:
        try:
            value = action()
        except Exception as error:
            where, is_input = f"rank {self.rank}: " if self.rank else "", isinstance(error, InputError)
            self._store.set(key, json.dumps({"error": f"{where}{error}", "is_input": is_input}))
            if is_input and self.rank:
                raise _ToldByMain(str(error)) from None
            raise
        self._store.set(key, json.dumps({"value": value}, default=str))

    def _read(self, key: str) -> Any:
        while not self._store.check([key]):  # waiting in the store would keep other threads from it
            time.sleep(0.01)
        found = json.loads(self._store.get(key))
        if "error" in found:
            raise (_ToldByMain if found["is_input"] else OSError)(found["error"])
        return found["value"]


class _Alone(Team):
    """A process alone, which has nobody to ask. ``Team`` says what the methods do."""

    def __init__(self) -> None:
        super().__init__(ALONE, Layout(), None)

    def device(self, device: torch.device) -> torch.device:
        return device

    def sum(self, tensor: Tensor, over: Literal["data", "pipeline", "world"] = "data") -> Tensor:
        return tensor

    def largest(self, numbers: list[Number]) -> list[Number]:
        return numbers

    def all_of(self, action: Callable[[], Value], by: Sequence[int] = ()) -> list[Value]:
        return [action()]

    def in_another_thread(self, name: str) -> Team:
        return self


SOLO = _Alone()


def join(config: RunConfig) -> Team:
    """Return the team that torchrun's variables make, after all of its ranks have met; ``SOLO`` without them.

    Raises:
        InputError: for wrong variables, for a layout that does not fit, and if other ranks do not come within
            ``parallel.timeout_seconds``.
    """
    launch = read_launch(os.environ)
    layout = plan_layout(config, launch.size)
    if launch.size == 1:
        return SOLO
    return Team(launch, layout, _meet(launch, config.parallel.timeout_seconds))


@functools.cache
def _meet(launch: Launch, timeout_seconds: int) -> dist.Store:
    """Make the group of all processes, and return a store that they share."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    notice = threading.Timer(10.0 if has_agent else 0.5, _say_who_is_missing, [launch])
    notice.daemon = True
    notice.start()
    try:
        if has_agent or launch.rank:
            _find_store(launch, time.monotonic() + timeout_seconds)
        store = _of_this_attempt(next(dist.rendezvous("env://", timeout=timeout))[0], launch)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
        atexit.register(time.sleep, _SECONDS_FOR_THREADS)
    except (RuntimeError, OSError) as error:
        raise _NobodyCame(
            f"the {launch.size} processes of RANK={launch.rank} WORLD_SIZE={launch.size} "
            f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port} did not meet within "
            f"parallel.timeout_seconds={timeout_seconds} ({str(error).splitlines()[0][:200]}); start all of them with "
            "torchrun, or unset these variables to train with one process"
        ) from None
    finally:
        notice.cancel()
    return dist.PrefixStore("moe_gpt", store)


def _of_this_attempt(store: dist.Store, launch: Launch) -> dist.Store:
    """Return a store without the keys of earlier attempts; all attempts share the one that torchrun keeps."""
    is_one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # else ranks may have other numbers of the attempt
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_node else "any"
    found = dist.PrefixStore(f"attempt {attempt} of {launch.size} ranks", store)
    if found.add(f"rank {launch.rank}", 1) > 1:
        raise _NobodyCame(
            "torchrun's store has keys of an earlier attempt, with which ranks could disagree; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun, and start again with --resume"
        )
    return found


def _find_store(launch: Launch, deadline: float) -> None:
    """Wait until somebody listens at the store's address; PyTorch's own attempts end with a page of C++ frames."""
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _say_who_is_missing(launch: Launch) -> None:
    n = launch.size - 1
    others = f"{n} more process{'es' * (n > 1)}" if launch.rank == 0 else "rank 0"
    text = f"rank {launch.rank} of {launch.size} waits for {others} at {launch.address}:{launch.port}"
    print(text, file=sys.stderr, flush=True)


def leave() -> None:
    """End the group, after a run that ended well."""
    if dist.is_initialized():
        dist.destroy_process_group()
