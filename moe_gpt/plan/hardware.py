"""What a plan can be priced on: GPUs by their datasheets, this machine measured, and how a model is laid out on many.

Speeds are peaks of dense products in bf16 with float32 sums, without the datasheets' factor 2 for sparsity. Links are
bytes per second in one direction, half of what NVLink's datasheets give as a total.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError

ZeroStage = Literal[0, 1, 2, 3, "fsdp"]
ZERO_STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3, "fsdp")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One accelerator of a cluster, in base units."""

    name: str
    memory_bytes: float
    bf16_flops: float
    """Dense matrix products, FLOP/s; of the CPU in float32, which is what training uses there."""
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """To another GPU of its node, bytes/s in one direction."""
    network: float
    """To another node, bytes/s in one direction, each GPU's share."""
    source: str
    per_node: int = 8
    """GPUs that ``link`` connects."""


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "a100-40gb", 40e9, 312e12, 1.555e12, 300e9, 25e9,
            "NVIDIA A100 datasheet (SXM 40 GB; NVLink 600 GB/s both ways); 200 Gb/s InfiniBand each (DGX A100)",
        ),
        Gpu(
            "a100-80gb", 80e9, 312e12, 2.039e12, 300e9, 25e9,
            "NVIDIA A100 datasheet (SXM 80 GB; NVLink 600 GB/s both ways); 200 Gb/s InfiniBand each (DGX A100)",
        ),
        Gpu(
            "h100", 80e9, 989.4e12, 3.35e12, 450e9, 50e9,
            "NVIDIA H100 datasheet (SXM; half of 1,979 TFLOP/s with sparsity; NVLink 900 GB/s both ways); "
            "400 Gb/s InfiniBand each (DGX H100)",
        ),
        Gpu(
            "h200", 141e9, 989.4e12, 4.8e12, 450e9, 50e9,
            "NVIDIA H200 datasheet (SXM; half of 1,979 TFLOP/s with sparsity; NVLink 900 GB/s both ways); "
            "400 Gb/s InfiniBand each (DGX H200)",
        ),
        Gpu(
            "b200", 180e9, 2.25e15, 8e12, 900e9, 50e9,
            "NVIDIA DGX B200 datasheet, an eighth of each (1,440 GB, 64 TB/s; half of 4.5 PFLOP/s a GPU with sparsity; "
            "NVLink 1.8 TB/s both ways); 400 Gb/s InfiniBand each",
        ),
        Gpu(
            "rtx-4090", 24e9, 165.2e12, 1.008e12, 32e9, 3.125e9,
            "NVIDIA Ada architecture whitepaper, appendix A (165.2 TFLOP/s, float32 sums); PCIe 4.0 x16, no NVLink; "
            "25 Gb/s Ethernet is assumed",
        ),
    )
}  # fmt: skip
"""The datasheets; ``cpu`` is measured instead."""

_OWN_KEYS = {
    "memory": "memory_bytes",
    "flops": "bf16_flops",
    "bandwidth": "bandwidth",
    "link": "link",
    "network": "network",
    "per_node": "per_node",
}


def find_gpu(name: str, own: Mapping[str, Gpu] | None = None) -> Gpu:
    """Return a GPU by its name, ``cpu`` measured now, or the one that ``name=mine,memory=...`` describes.

    Raises:
        InputError: where there is none of that name, with those there are; or the description is wrong.
    """
    if "=" in name:
        return parse_gpu(name)
    known = {**GPUS, **(own or {})}
    if name in known:
        return known[name]
    if name == "cpu":
        return measure_cpu()
    raise InputError(
        f"there is no GPU {name!r}; choose one of {', '.join([*known, 'cpu'])}, or give figures of your own: "
        "name=mine,memory=96e9,flops=4e14,bandwidth=2e12,link=4e11,network=5e10"
    )


def parse_gpu(text: str) -> Gpu:
    """Read a GPU's own figures: ``name=mine,memory=96e9,flops=4e14,bandwidth=2e12,link=4e11,network=5e10``.

    Bytes, FLOP/s and bytes/s; links in one direction. ``per_node=8`` may be left out, and so may ``name``.

    Raises:
        InputError: naming every key that is missing, unknown, given twice, or not a number above 0.
    """
    values: dict[str, str] = {}
    problems = []
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key in values:
            problems.append(f"{key} is given twice")
        elif key not in ("name", *_OWN_KEYS):
            problems.append(f"{key!r} is none of name, {', '.join(_OWN_KEYS)}")
        elif not equals or not value:
            problems.append(f"{key} has no value")
        values[key] = value
    missing = [key for key in _OWN_KEYS if key not in values and key != "per_node"]
    if missing:
        problems.append(f"{', '.join(missing)} must be given")
    numbers: dict[str, Any] = {}
    for key in _OWN_KEYS.keys() & values.keys():
        try:
            numbers[_OWN_KEYS[key]] = check_positive(key, values[key])
        except InputError as error:
            problems.append(str(error))
    per_node = numbers.pop("per_node", 8)
    if per_node != int(per_node):
        problems.append(f"per_node must be a whole number, got {values['per_node']}")
    if problems:
        raise InputError(f"GPU {text!r}: " + "; ".join(problems))
    return Gpu(name=values.get("name", "own"), source="given by the user", per_node=int(per_node), **numbers)


def check_positive(name: str, value: Any) -> float:
    """Return a value as a number.

    Raises:
        InputError: where it is none, or not above 0.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} must be a number above 0, got {value}")
    return number


def measure_cpu() -> Gpu:
    """Measure this machine in a fraction of a second: float32 products, copies in memory, the memory's size."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    flops = 2 * size**3 / _fastest(lambda: torch.mm(a, b))
    source, target = torch.zeros(1 << 24), torch.empty(1 << 24)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))  # read and written
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu(
        "cpu", memory, flops, bandwidth, bandwidth, bandwidth,
        f"measured here and now: {size} x {size} float32 product and a copy of {source.nbytes >> 20} MiB, best of 5 "
        f"with {torch.get_num_threads()} threads; links are the memory's",
    )  # fmt: skip


def _fastest(work: Any, budget_seconds: float = 0.25) -> float:
    """Return the seconds of the fastest of up to five calls after one that warms up."""
    work()
    times: list[float] = []
    while len(times) < 5 and sum(times) < budget_seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """How a model is laid out on ``n_gpus``; those that do not fill another copy of it are spares.

    Expert parallelism is part of data parallelism: a group of ``expert`` GPUs holds every expert once and reads
    ``expert`` micro-batches at a time, each GPU with its own copy of all that is not an expert (DeepSpeed-MoE,
    arXiv 2201.05596, section 5).

    Raises:
        InputError: with a line for every value that cannot be.
    """

    n_gpus: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    zero: ZeroStage = 1

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a whole number of at least 1, got {getattr(self, name)}"
            for name in ("n_gpus", "tensor", "pipeline", "expert")
            if not _is_count(getattr(self, name))
        ]
        if self.zero not in ZERO_STAGES or isinstance(self.zero, bool):
            problems.append(f"zero must be one of {', '.join(map(str, ZERO_STAGES))}, got {self.zero}")
        if not problems and self.n_gpus < self.model_gpus:
            problems.append(
                f"n_gpus must be at least tensor x pipeline x expert = {self.tensor} x {self.pipeline} x {self.expert} "
                f"= {self.model_gpus}, got {self.n_gpus}"
            )
        if problems:
            raise InputError("\n".join(problems))

    @property
    def model_gpus(self) -> int:
        """GPUs that hold one copy of every expert."""
        return self.tensor * self.pipeline * self.expert

    @property
    def data_parallel(self) -> int:
        """Copies of every expert."""
        return self.n_gpus // self.model_gpus

    @property
    def batch_ranks(self) -> int:
        """Micro-batches at a time, and copies of what is not an expert: ``data_parallel`` times ``expert``."""
        return self.data_parallel * self.expert

    @property
    def used(self) -> int:
        """GPUs that work."""
        return self.data_parallel * self.model_gpus

    @property
    def spares(self) -> int:
        """GPUs that are paid for and left over."""
        return self.n_gpus - self.used

    @property
    def shards_gradients(self) -> bool:
        """Whether each data-parallel rank keeps a part of the gradients only."""
        return self.zero in (2, 3, "fsdp")

    @property
    def shards_weights(self) -> bool:
        """Whether each data-parallel rank keeps a part of the weights only."""
        return self.zero in (3, "fsdp")

    def check(self, model: ModelConfig) -> None:
        """Raise InputError with a line for everything about the model that this layout does not divide."""
        problems = list(self._indivisible(model))
        if problems:
            raise InputError("\n".join(problems))

    def _indivisible(self, model: ModelConfig) -> Iterator[str]:
        for name, size, axis in (
            ("n_heads", model.n_heads, "tensor"),
            ("n_layers", model.n_layers, "pipeline"),
            ("n_experts", model.n_experts, "expert"),
        ):
            if size % getattr(self, axis):
                fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                yield (
                    f"model.{name}={size} must be a multiple of {axis}, got {axis}={getattr(self, axis)}; choose "
                    f"one of {fitting}"
                )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
