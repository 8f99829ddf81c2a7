"""The processes of a run: what torchrun's variables say, the group, and how its ranks agree.

A process alone has a ``Team`` of one, which makes no group and changes nothing.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_gpt.config import RunConfig
from moe_gpt.distributed.layout import Layout, plan_layout
from moe_gpt.errors import InputError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_FOR_THREADS = 0.3
"""Threads of gloo let go of the last collective's tensors after it has ended, for which they need the interpreter. A
process whose interpreter ends before that is aborted."""
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


def read_launch(variables: Mapping[str, str]) -> Launch | None:
    """Return what the variables say; None for a process alone, also where Slurm's variables are set.

    Raises:
        InputError: naming the variable that is missing or wrong.
    """
    if "RANK" not in variables and "WORLD_SIZE" not in variables:
        return None
    _check_all_given(variables)
    rank, size, port = (_number(variables, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size:
        raise InputError(f"RANK must be below WORLD_SIZE={size}, got {rank}; start with torchrun, or unset both")
    local_rank = _number(variables, "LOCAL_RANK") if "LOCAL_RANK" in variables else rank
    return Launch(rank, size, local_rank, variables["MASTER_ADDR"], port)


def _check_all_given(variables: Mapping[str, str]) -> None:
    given = [f"{name}={variables[name]}" for name in _VARIABLES if name in variables]
    missing = [name for name in _VARIABLES if name not in variables]
    if missing:
        raise InputError(
            f"{' '.join(given)} is set in the environment without {', '.join(missing)}; start with torchrun, which "
            "sets all of them, or unset them for a single process"
        )


def _number(variables: Mapping[str, str], name: str) -> int:
    if not variables[name].isdecimal():
        raise InputError(f"{name} in the environment must be a whole number, got {variables[name]!r}; unset it")
    return int(variables[name])


def is_another_rank() -> bool:
    """Whether this process is one of several and not the one that prints."""
    try:
        launch = read_launch(os.environ)
    except InputError:
        return False
    return launch is not None and launch.rank > 0


def should_tell(error: InputError) -> bool:
    """Whether a rank other than 0 must show an error itself. All of them have those before the group is there."""
    return isinstance(error, _NobodyCame) or (dist.is_initialized() and not isinstance(error, _ToldByMain))


def is_lost_rank(error: Exception) -> bool:
    """Whether an error of a collective says that another rank is gone or late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class Team:
    """The ranks that train together: this one is a process alone."""

    rank, size, layout = 0, 1, Layout()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this is the rank that answers for what all ranks of its stage have."""
        return self.rank % (self.layout.data * self.layout.tensor) == 0

    @property
    def data_rank(self) -> int:
        """Which part of the rows this rank reads, of ``layout.data`` parts."""
        return self.layout.data_rank(self.rank)

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's device of that kind."""
        return device

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all data ranks, which read different rows."""
        return tensor

    def sum_of_stages(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all stages; each has zeros for what others know."""
        return tensor

    def sum_of_all(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all ranks."""
        return tensor

    def largest(self, numbers: list[Number]) -> list[Number]:
        """Return the largest of all ranks' numbers at each place; the host knows them, so no device is waited for."""
        return numbers

    def from_main(self, action: Callable[[], Value]) -> Value:
        """Return what the action returns on rank 0, which alone does it: JSON's values. All raise its error."""
        return action()

    def main_first(self, action: Callable[[], Value]) -> Value:
        """Return what the action returns here; the other ranks wait until rank 0 has done it."""
        return action()

    def together(self, action: Callable[[], Value]) -> Value:
        """Return what the action returns here; if it fails on any rank, all raise that error."""
        return action()

    def in_another_thread(self, name: str) -> Team:
        """Return a team for agreements in another thread, which may come in another order on each rank.

        Args:
            name: of these agreements, the same on all ranks and new each time.
        """
        return self

    def all_of(self, action: Callable[[], Value]) -> list[Value]:
        """Return what the action returns on each rank: JSON's values. If it fails on any rank, all raise that error."""
        return [action()]


class _Ranks(Team):
    """Several ranks. What only the host knows is agreed by the store, whatever the time that rank 0 takes.

    ``Team`` says what the methods do.
    """

    _agreements = itertools.count()
    """Numbers them, for the whole life of the process, because the store keeps them."""

    def __init__(self, launch: Launch, store: dist.Store, layout: Layout) -> None:
        self.rank, self.size, self.layout = launch.rank, launch.size, layout
        self._launch, self._store = launch, store
        if layout.pipeline > 1:  # now, because all ranks must do it, and later each waits for the stage before it
            _group(layout, "data"), _group(layout, "pipeline")

    def device(self, device: torch.device) -> torch.device:
        if device.type == "cuda":
            device = torch.device("cuda", self._launch.local_rank)
            torch.cuda.set_device(device)
        elif device.type != "cpu":
            raise InputError(f"several processes train on cpu or cuda, got --device {device.type}")
        return device

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total, group=_group(self.layout, "data"))
        return total

    def sum_of_stages(self, tensor: Tensor) -> Tensor:
        if self.layout.pipeline == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=_group(self.layout, "pipeline"))
        return total

    def sum_of_all(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def largest(self, numbers: list[Number]) -> list[Number]:
        found = torch.tensor(numbers)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def from_main(self, action: Callable[[], Value]) -> Value:
        key = f"agreement/{next(self._agreements)}"
        return self._published(key, action) if self.is_main else self._read(key)

    def main_first(self, action: Callable[[], Value]) -> Value:
        result: list[Value] = []
        self.from_main(lambda: result.append(action()))
        return result[0] if self.is_main else action()

    def together(self, action: Callable[[], Value]) -> Value:
        result: list[Value] = []
        self.all_of(lambda: result.append(action()))
        return result[0]

    def in_another_thread(self, name: str) -> Team:
        other = _Ranks(self._launch, dist.PrefixStore(name, self._store), self.layout)
        other._agreements = itertools.count()  # type: ignore[misc]
        return other

    def all_of(self, action: Callable[[], Value]) -> list[Value]:
        number = next(self._agreements)
        keys = [f"agreement/{number}/{rank}" for rank in range(self.size)]
        try:
            self._published(keys[self.rank], action)
        except InputError as error:
            raise error if self.is_main else _ToldByMain(str(error)) from None
        return [self._read(key) for key in keys]

    def _published(self, key: str, action: Callable[[], Value]) -> Value:
        try:
            value = action()
        except Exception as error:
            where = f"rank {self.rank}: " if self.rank else ""
            self._store.set(key, json.dumps({"error": f"{where}{error}", "is_input": isinstance(error, InputError)}))
            raise
        self._store.set(key, json.dumps({"value": value}, default=str))
        return value

    def _read(self, key: str) -> Any:
        while not self._store.check([key]):  # waiting in the store would keep other threads from it
            time.sleep(0.01)
        found = json.loads(self._store.get(key))
        if "error" in found:
            raise (_ToldByMain if found["is_input"] else OSError)(found["error"])
        return found["value"]


@functools.cache
def _group(layout: Layout, kind: Literal["pipeline", "data"]) -> dist.ProcessGroup | None:
    """Return the group of the ranks that differ from this one only in their stage or data rank; None for all ranks."""
    size = getattr(layout, kind)
    if size == layout.world:
        return None
    ranks = torch.arange(layout.world).view(layout.pipeline, layout.data, layout.tensor)
    mine, _ = dist.new_subgroups_by_enumeration(ranks.movedim(int(kind == "data"), 2).reshape(-1, size).tolist())
    return mine


SOLO = Team()


def join(config: RunConfig) -> Team:
    """Return the team that torchrun's variables make, after all of its ranks have met; ``SOLO`` without them.

    Raises:
        InputError: for wrong variables, for a layout that does not fit, and if other ranks do not come within
            ``parallel.timeout_seconds``.
    """
    launch = read_launch(os.environ)
    layout = plan_layout(config, launch.size if launch else 1)
    if launch is None or launch.size == 1:
        return SOLO
    return _Ranks(launch, _meet(launch, config.parallel.timeout_seconds), layout)


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
    except InputError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
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
    """Return a store without the keys of earlier attempts; all attempts share the one that torchrun keeps.

    Only where torchrun runs on one node do all ranks have the same number of the attempt.
    """
    is_one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
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
