"""What a plan is priced on: GPUs by datasheet, this machine measured, and how a model is laid out on many of them."""

from __future__ import annotations

import dataclasses
import re
import timeit
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import psutil

from moe_gpt.config import ModelConfig
from moe_gpt.config.section import Count, CountOrZero, NonNegative, Positive, Problem, Section, divisors
from moe_gpt.errors import ConfigError, InputError
from moe_gpt.plan.data_files import read_data
from moe_gpt.plan.quantities import PlanSection, plan_section
from moe_gpt.terminal.numbers import plural

ZeroStage = Literal[0, 1, 2, 3, "fsdp"]


@dataclasses.dataclass(frozen=True)
class Gpu(Section):
    """One accelerator of a cluster, in base units."""

    name: str
    memory_bytes: Positive
    bf16_flops: Positive
    """Dense matrix products, FLOP/s; of the CPU in float32, which is what training uses there."""
    bandwidth: Positive
    """Of its memory, bytes/s."""
    link: Positive
    """To another GPU of its node, bytes/s in one direction."""
    network: Positive
    """To another node, bytes/s in one direction, each GPU's share."""
    source: str
    per_node: Count = 8
    """GPUs that ``link`` connects."""
    cores: CountOrZero = 0
    """Of a CPU: cores that its figures were measured with."""
    load: NonNegative = 0.0
    """Of a CPU: processes that ran or waited in the minute before it was measured."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is this machine's processor."""
        return self.name == "cpu"

    @property
    def is_busy(self) -> bool:
        """Whether other processes slowed the measurement: more than one for two cores."""
        return self.load > self.cores / 2


def read_gpus(table: Mapping[str, Any]) -> dict[str, Gpu]:
    """Return the GPUs of a table like gpus.yaml.

    Raises:
        ConfigError: naming the GPU and the figure, for everything that is missing, unknown or not a number above 0.
    """
    gpus, problems = {}, []
    for name, figures in table.items():
        try:
            gpus[name] = Gpu.from_mapping({"name": name, **figures})
        except ConfigError as error:
            problems += [f"{name}.{problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return gpus


GPUS: Mapping[str, Gpu] = read_gpus(read_data("gpus.yaml"))
"""The datasheets; ``cpu`` is measured instead."""

_FIGURES = {"memory": "memory_bytes", "flops": "bf16_flops"} | {
    name: name for name in ("bandwidth", "link", "network", "per_node")
}
"""A GPU's figures, as ``--gpu name=mine,memory=...`` and the plan call them, and their fields."""


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name, ``cpu`` measured now, or the one that ``name=mine,memory=...`` describes.

    A name may have the memory after it, as in ``h100-80gb``, where that is the memory of the table.

    Raises:
        InputError: where there is none of that name, with those there are; or the description is wrong.
    """
    if "=" in name:
        return parse_gpu(name)
    if name == "cpu":
        return measure_cpu()
    found = _SPELLINGS.get(_letters(name))
    if found is None:
        raise InputError(
            f"there is no GPU {name!r}; choose one of {', '.join([*GPUS, 'cpu'])}, or give figures of your own: "
            "name=mine,memory=96e9,flops=4e14,bandwidth=2e12,link=4e11,network=5e10"
        )
    return found


def gpu_of(device: str) -> Gpu | None:
    """Return the GPU that PyTorch calls ``cuda (NVIDIA A100-SXM4-80GB)``; None for those the table lacks."""
    return _SPELLINGS.get(_letters(re.sub("cuda(:[0-9]+)?|NVIDIA|GeForce|SXM[0-9]|HBM[0-9]e?", "", device)))


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


_SPELLINGS = {
    _letters(name + memory): gpu for name, gpu in GPUS.items() for memory in ("", f"{gpu.memory_bytes / 1e9:g}gb")
}
"""GPUs by what people call them: h100-80gb, H100_80GB, RTX 4090; another memory than the table's is another GPU."""


def parse_gpu(text: str) -> Gpu:
    """Read a GPU's own figures: ``name=mine,memory=96e9,flops=4e14,bandwidth=2e12,link=4e11,network=5e10``.

    Bytes, FLOP/s and bytes/s; links in one direction. ``per_node=8`` may be left out, and so may ``name``.

    Raises:
        InputError: naming every key that is missing, unknown, given twice, or not a number above 0.
    """
    pairs = [[piece.strip() for piece in part.partition("=")[::2]] for part in text.split(",")]
    figures = {_FIGURES.get(key, key): value for key, value in pairs}
    problems = [f"{key} is given twice" for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    try:
        gpu = Gpu.from_mapping({"name": "own", "source": "given by the user", **figures})
    except ConfigError as error:
        problems += error.problems
    if problems:
        message = "; ".join(problems)
        for key, field in _FIGURES.items():
            message = message.replace(field, key)
        raise InputError(f"GPU {text!r}: {message}")
    return gpu


def measure_cpu() -> Gpu:
    """Measure this machine in a fraction of a second: float32 products, copies in memory, the memory's size."""
    import torch

    size, load = 1024, psutil.getloadavg()[0]
    a, b = torch.randn(size, size), torch.randn(size, size)
    flops = 2 * size**3 / _fastest(lambda: torch.mm(a, b))
    source, target = torch.zeros(1 << 24), torch.empty(1 << 24)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))  # read and written
    cores = torch.get_num_threads()
    return Gpu(
        "cpu", psutil.virtual_memory().total, flops, bandwidth, bandwidth, bandwidth,
        f"measured here and now: {size} x {size} float32 product and a copy of {source.nbytes >> 20} MiB, best of 5 "
        f"with {plural(cores, 'thread')}; links have the bandwidth of the memory", cores=cores, load=load,
    )  # fmt: skip


def _fastest(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of five calls, after one that warms up."""
    work()
    return min(timeit.repeat(work, number=1, repeat=5))


def gpu_section(gpu: Gpu) -> PlanSection:
    """Return the figures of the GPU that the plan reckons with."""
    values = {key: getattr(gpu, field) for key, field in _FIGURES.items()}
    return plan_section("gpu", values, {"busy": gpu.is_busy}, gpu=gpu)


@dataclasses.dataclass(frozen=True)
class Parallelism(Section):
    """How a model is laid out on ``n_gpus``; those that do not fill another copy of it are spares.

    Expert parallelism is part of data parallelism: a group of ``expert`` GPUs holds every expert once and reads
    ``expert`` micro-batches at a time, each GPU with its own copy of all that is not an expert (DeepSpeed-MoE,
    arXiv 2201.05596, section 5).
    """

    n_gpus: Count
    tensor: Count = 1
    """GPUs that share each layer."""
    pipeline: Count = 1
    """Stages, one after another, that the layers are dealt out to."""
    expert: Count = 1
    """GPUs that share the experts of each layer."""
    zero: ZeroStage = 1
    """What ZeRO splits over the data-parallel ranks: 1 the optimizer, 2 gradients too, 3 and fsdp weights too."""

    def problems(self) -> Iterator[Problem]:
        """Yield that the GPUs do not hold one copy of the model."""
        if self.n_gpus < self.model_gpus:
            yield Problem(
                ("n_gpus", "tensor", "pipeline", "expert"),
                f"n_gpus must be at least tensor x pipeline x expert = {self.tensor} x {self.pipeline} x {self.expert} "
                f"= {self.model_gpus}, got {self.n_gpus}",
            )

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
    def zero_level(self) -> int:
        """ZeRO's stage as a number; FSDP splits what stage 3 splits."""
        return 3 if self.zero == "fsdp" else self.zero

    def check(self, model: ModelConfig, *, serving: bool = False) -> None:
        """Check that the layout divides a model: heads by tensor, layers by pipeline, experts by expert.

        When serving, the stages of a pipeline may have different numbers of layers.

        Raises:
            InputError: with a line for everything that does not go round.
        """
        axes = {"tensor": "n_heads", "expert": "n_experts"} if serving else DIVIDED
        problems = [line for axis, name in axes.items() for line in self._indivisible(model, name, axis)]
        if self.pipeline > model.n_layers and serving:
            problems.append(f"model.n_layers={model.n_layers} must be at least pipeline, got pipeline={self.pipeline}")
        if problems:
            raise InputError("\n".join(f"{'when serving, ' if serving else ''}{problem}" for problem in problems))

    def _indivisible(self, model: ModelConfig, name: str, axis: str) -> Iterator[str]:
        size, by = getattr(model, name), getattr(self, axis)
        if size % by:
            yield f"model.{name}={size} must be a multiple of {axis}, got {axis}={by}; choose one of {divisors(size)}"


DIVIDED = {"tensor": "n_heads", "pipeline": "n_layers", "expert": "n_experts"}
"""What each axis of a layout divides."""
