"""Which rank holds what: the sizes that follow from ``parallel`` and the number of processes, and what cannot be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.config.section import divisors
from moe_gpt.errors import InputError

_MOST_UNEVEN = 1.5
"""The largest part of the experts may be this many times the mean part."""


class Layout(NamedTuple):
    """How ranks share a run: rank (p · data + d) · tensor + t is stage p, data rank d and tensor rank t."""

    data: int = 1
    """Data ranks, each with its part of every micro-batch."""
    replicate: int = 1
    """Copies of what is sharded."""
    expert: int = 1
    """Consecutive data ranks that hold different experts."""
    zero: int = 3
    tensor: int = 1
    """Ranks that share each matrix product, and read the same rows."""
    pipeline: int = 1
    """Stages of consecutive blocks."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.data * self.tensor * self.pipeline

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the model, without its experts if they are spread, is sharded."""
        return self.data // self.replicate

    @property
    def expert_shards(self) -> int:
        """Ranks over which one rank's share of the experts is sharded."""
        return self.shards // self.expert if self.zero else 1

    def shown(self) -> str:
        """Return the layout in words."""
        parts = (
            (f"{self.pipeline} stages", self.pipeline),
            (f"products over {self.tensor}", self.tensor),
            (f"ZeRO {self.zero}", self.data),
            (f"{self.replicate} copies", self.replicate * (self.zero > 0)),
            (f"experts over {self.expert}", self.expert),
        )
        return ", ".join([f"{self.world} processes", *(text for text, n in parts if n > 1)])


def plan_layout(config: RunConfig, world: int) -> Layout:
    """Return the layout of a run on ``world`` processes.

    Raises:
        InputError: in one line, with the numbers that do not fit and those that would.
    """
    wanted, data = config.parallel, _data_ranks(config, world)
    copies = data if wanted.zero == 0 else wanted.replicate
    layout = Layout(data, copies, wanted.expert, wanted.zero, wanted.tensor, wanted.pipeline)
    for key, number, n in (
        ("replicate", wanted.replicate, data),
        ("expert", wanted.expert, layout.shards if wanted.zero else data),
    ):
        if n % number:
            over = f" / replicate={copies}" if n < data else ""
            how = f"; start torchrun with --nproc-per-node {number}" if data == 1 else ""
            raise InputError(
                f"parallel.{key} must divide the number of data ranks{over}, got {number} for {n}; it may be "
                f"{divisors(n)}{how}"
            )
    for problem in _impossible(config, layout):
        raise InputError(f"{problem} ({_processes(world)})")
    return layout


def _processes(world: int) -> str:
    return f"{world} processes" if world > 1 else "1 process"


def _data_ranks(config: RunConfig, world: int) -> int:
    """Return how many ranks share the rows: all processes over those that share products and stages."""
    wanted = config.parallel
    others = wanted.tensor * wanted.pipeline
    data = world // others if wanted.data == "auto" else wanted.data
    if data * others != world:
        product = f"parallel.data={wanted.data} x tensor={wanted.tensor} x pipeline={wanted.pipeline}"
        needed, times = (others, "a multiple of ") if wanted.data == "auto" else (data * others, "")
        raise InputError(
            f"{product} needs {times}{_processes(needed)}, got {world}; start torchrun with --nproc-per-node {needed}, "
            "or change these settings"
        )
    return data


def _impossible(config: RunConfig, layout: Layout) -> Iterator[str]:
    """Yield what these ranks cannot do."""
    model, n, parts = config.model, layout.expert, layout.expert_shards
    for is_wrong, text in (
        (
            not _fits(model.n_experts, n),
            f"parallel.expert={n} does not fit model.n_experts={model.n_experts}: the largest part is more than "
            f"{_MOST_UNEVEN} times the mean, or a rank has none; it may be {_fitting(model.n_experts, layout.data)}",
        ),
        (
            model.n_experts > 1 and expert_dim(config, layout) is None,
            f"model.n_experts={model.n_experts}, d_model={model.d_model} and d_ff={model.d_ff} cannot be cut into "
            f"{parts} parts of which the largest is at most {_MOST_UNEVEN} times the mean; "
            "set parallel.zero=1, or change parallel.replicate",
        ),
        (
            layout.expert * layout.tensor > 1 and config.train.compile,
            "train.compile must be false where parallel.expert or parallel.tensor is above 1",
        ),
        (
            _stages(config) > _units(model),
            f"parallel.pipeline={layout.pipeline} with pipeline_schedule={config.parallel.pipeline_schedule} makes "
            f"{_stages(config)} stages, but only {_units(model)} can be cut from model.n_layers={model.n_layers} with "
            f"attention_sharing={model.attention_sharing}; pipeline may be at most "
            f"{max(1, _units(model) * layout.pipeline // _stages(config))}",
        ),
        (
            not _can_share(model, layout.tensor),
            f"parallel.tensor={layout.tensor} must divide model.n_heads={model.n_heads}, d_ff={model.d_ff} and, "
            f"if above 1, n_kv_heads={model.n_kv_heads}; it may be "
            f"{', '.join(str(n) for n in range(1, model.n_heads + 1) if _can_share(model, n))}",
        ),
        (
            layout.data > 1 and model.capacity_factor is not None,
            "model.capacity_factor must be null here: which tokens are dropped depends on the rows of all ranks",
        ),
        (
            layout.data * layout.tensor > 1 and config.optimizer.state_type == "int8",
            "optimizer.state_type=int8 needs one process or a pipeline alone, because its blocks would be cut; use "
            "bfloat16",
        ),
    ):
        if is_wrong:
            yield text


def layers_of_stages(config: RunConfig) -> list[range]:
    """Return the layers of each stage of a pipeline. Rank p of P holds stages p, p + P and so on.

    Layers that share an attention stay together. Where the stages cannot be equal, earlier ones have more.
    """
    model, n = config.model, _stages(config)
    borders = [math.ceil(_units(model) * stage / n) * model.attention_sharing for stage in range(n + 1)]
    return [range(*ends) for ends in itertools.pairwise(borders)]


def _stages(config: RunConfig) -> int:
    n, order = config.parallel.pipeline, config.parallel.pipeline_schedule
    return 2 * n if n > 1 and order == "interleaved" else n


def _units(model: ModelConfig) -> int:
    """Return how many stages there can be."""
    return model.n_layers // model.attention_sharing


def _can_share(model: ModelConfig, n: int) -> bool:
    """Whether n ranks can share the matrix products."""
    lengths = [model.n_heads, model.d_ff] + [model.n_kv_heads] * (model.n_kv_heads > 1)
    return all(length % n == 0 for length in lengths)


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
    experts are spread, only an inner dimension will do. Below ZeRO 2 anything will do, because nothing is cut.
    """
    model, parts = config.model, layout.expert_shards
    if layout.zero < 2:
        return 0
    d_ff = model.d_ff // layout.tensor
    lengths = {0: model.n_experts} if layout.expert == 1 else {}
    lengths |= {1: math.gcd(2 * d_ff, model.d_model), 2: math.gcd(d_ff, model.d_model)}
    uneven = 0 if 0 in lengths and _is_even(model.n_experts, parts) else None
    return next((dim for dim, length in lengths.items() if length % parts == 0), uneven)
