"""Which rank holds what: the sizes that follow from ``parallel`` and the number of processes, and what cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_gpt.config import RunConfig
from moe_gpt.config.section import divisors
from moe_gpt.errors import InputError

_MOST_UNEVEN = 1.5
"""The largest part of the experts may be this many times the mean part."""


class Layout(NamedTuple):
    """How ``data`` ranks share a run."""

    data: int = 1
    """Ranks, each with its part of every micro-batch."""
    replicate: int = 1
    """Copies of what is sharded."""
    expert: int = 1
    """Consecutive ranks that hold different experts."""
    zero: int = 3

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the model, without its experts if they are spread, is sharded."""
        return self.data // self.replicate

    @property
    def expert_shards(self) -> int:
        """Ranks over which one rank's share of the experts is sharded, where experts are spread."""
        return self.shards // self.expert if self.zero else 1

    def shown(self) -> str:
        """Return the layout in words."""
        parts = [f"{self.data} processes", f"ZeRO {self.zero}"]
        parts += [f"{self.replicate} copies"] * (self.zero > 0 and self.replicate > 1)
        return ", ".join(parts + [f"experts over {self.expert}"] * (self.expert > 1))


def plan_layout(config: RunConfig, world: int) -> Layout:
    """Return the layout of a run on ``world`` processes.

    Raises:
        InputError: in one line, with the numbers that do not fit and those that would.
    """
    wanted = config.parallel
    if wanted.data not in ("auto", world):
        raise InputError(
            f"parallel.data must be auto or the number of processes, got {wanted.data} for {_processes(world)}; start "
            f"torchrun with --nproc-per-node {wanted.data}, or set parallel.data=auto"
        )
    for key in ("replicate", "expert"):
        _check_divides(config, key, world)
    layout = Layout(world, world if wanted.zero == 0 else wanted.replicate, wanted.expert, wanted.zero)
    if wanted.zero and layout.shards % layout.expert:
        raise InputError(
            f"parallel.replicate x parallel.expert must divide the number of processes, got {wanted.replicate} x "
            f"{wanted.expert} for {_processes(world)}; with that replicate, expert may be {divisors(layout.shards)}"
        )
    for problem in _impossible(config, layout):
        raise InputError(f"{problem} ({_processes(world)})")
    return layout


def _processes(world: int) -> str:
    return f"{world} processes" if world > 1 else "1 process"


def _check_divides(config: RunConfig, key: str, world: int) -> None:
    number = getattr(config.parallel, key)
    if world % number:
        how = f"; start torchrun with --nproc-per-node {number}" if world == 1 else ""
        raise InputError(
            f"parallel.{key} must divide the number of processes, got {number} for {_processes(world)}; it may be "
            f"{divisors(world)}{how}"
        )


def _impossible(config: RunConfig, layout: Layout) -> Iterator[str]:
    """Yield what these ranks cannot do."""
    model, n = config.model, layout.expert
    parts = layout.expert_shards if n > 1 else layout.shards
    for is_wrong, text in (
        (
            not _fits(model.n_experts, n),
            f"parallel.expert={n} does not fit model.n_experts={model.n_experts}: the largest part is more than "
            f"{_MOST_UNEVEN} times the mean, or a rank has none; it may be {_fitting(model.n_experts, layout.data)}",
        ),
        (
            model.n_experts > 1 and expert_dim(config, layout) is None,
            f"model.n_experts={model.n_experts}, d_model={model.d_model} and d_ff={model.d_ff} cannot be cut into "
            f"{parts} parts of which the largest is at most {_MOST_UNEVEN} times the mean; change parallel.replicate",
        ),
        (n > 1 and config.train.compile, "train.compile must be false where parallel.expert is above 1"),
        (
            layout.data > 1 and model.capacity_factor is not None,
            "model.capacity_factor must be null here: which tokens are dropped depends on the rows of all ranks",
        ),
        (
            layout.data > 1 and config.optimizer.state_type == "int8",
            "optimizer.state_type=int8 needs one process, because its blocks would be cut; use bfloat16",
        ),
    ):
        if is_wrong:
            yield text


def _fitting(n_experts: int, data: int) -> str:
    return ", ".join(str(n) for n in range(1, data + 1) if data % n == 0 and _fits(n_experts, n))


def _fits(n_experts: int, parts: int) -> bool:
    """Whether experts can be cut into parts evenly enough, each with at least one of them."""
    return _is_even(n_experts, parts) and math.ceil(n_experts / parts) * (parts - 1) < n_experts


def _is_even(length: int, parts: int) -> bool:
    return math.ceil(length / parts) * parts <= _MOST_UNEVEN * length


def expert_dim(config: RunConfig, layout: Layout) -> int | None:
    """Return the dimension along which both stacks (E, 2F, D) and (E, D, F) are sharded; None if none will do.

    The experts themselves come first, then an inner dimension, both if they divide, then the experts unevenly. Where
    experts are spread, only an inner dimension will do.
    """
    model, parts = config.model, layout.expert_shards if layout.expert > 1 else layout.shards
    lengths = {0: (model.n_experts,), 1: (2 * model.d_ff, model.d_model), 2: (model.d_model, model.d_ff)}
    if layout.expert > 1:
        del lengths[0]
    even = [dim for dim, sizes in lengths.items() if not any(size % parts for size in sizes)]
    if even:
        return even[0]
    return 0 if 0 in lengths and _is_even(model.n_experts, parts) else None
