"""``moe-gpt bench``: measure speed and memory against what users would otherwise take."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_gpt.commands.options import AboveZero, Device, Precision, Switch, Whole, flat
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError

if TYPE_CHECKING:
    import torch

    from moe_gpt.bench.contenders import Workload
    from moe_gpt.config import RunConfig
    from moe_gpt.ops import device as ops_device


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Device, repetitions and output file."""

    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "auto"
    """Compute type."""
    rounds: Whole = 5
    """Turns that each contender gets."""
    steps: Whole = 3
    """Measurements in a turn."""
    json: Path | None = None
    """Also write the machine and the results into this file."""

    def place(self) -> tuple[torch.device, ops_device.Precision]:
        """Return device and compute type."""
        from moe_gpt.ops.device import pick_device, pick_precision

        chosen = pick_device(self.device)
        return chosen, pick_precision(self.precision, chosen)


def _fitting(config: str, device: torch.device) -> RunConfig:
    """Return a config after refusing one that is far too large for the device."""
    from moe_gpt.training.fits import refuse_full_size

    settings = load_run_config(config)
    refuse_full_size(settings, device)
    return settings


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped(Measurement):
    """The measured shape, with the options of ``Measurement``."""

    shape: Literal["S", "M", "L"] | None = None
    """A shape of docs/benchmarks.md; S by default."""
    config: str | None = None
    """Measure the model and the last stage of this config instead of a shape."""

    def workload(self, load: Callable[[str, torch.device], RunConfig] = _fitting) -> Workload:
        """Return shape, device and precision."""
        from moe_gpt.bench.contenders import SHAPES, Workload, workload_of

        if self.shape and self.config:
            raise InputError(f"--shape and --config: give one of them, got {self.shape} and {self.config}")
        chosen, precision = self.place()
        if self.config:
            return workload_of(load(self.config, chosen), chosen, precision)
        model, n_sequences, seq_len = SHAPES[self.shape or "S"]
        return Workload(model, n_sequences, seq_len, str(chosen), precision, n_sequences * seq_len)


def train(
    *,
    against: str = "transformers,dense",
    warmup: Whole = 5,
    compile: Switch = False,
    micro_batch_tokens: Whole | None = None,
    activation_checkpointing: Switch = False,
    tune_peers: Switch = False,
    options: Shaped = Shaped(),
) -> None:
    """Measure whole optimizer steps against peers, in turns.

    Args:
        against: Names of peers, comma-separated.
        warmup: Steps before the measured ones.
        compile: Use torch.compile, on each block of moe_gpt and on the peers as a whole.
        micro_batch_tokens: Tokens of one forward pass; the whole batch by default.
        activation_checkpointing: Recompute activations, in moe_gpt and in the peers.
        tune_peers: Give the peers the allocator settings of moe_gpt, too.
    """
    from moe_gpt.bench.train import bench_train

    work = dataclasses.replace(
        options.workload(), compile=compile, activation_checkpointing=activation_checkpointing, tune_peers=tune_peers
    )
    if micro_batch_tokens:
        work = dataclasses.replace(work, micro_batch_tokens=micro_batch_tokens)
    names = [name for name in against.split(",") if name]
    _report(options.json, functools.partial(bench_train, work, names, options.rounds, options.steps, warmup=warmup))


def layer(*, options: Shaped = Shaped()) -> None:
    """Measure one mixture-of-experts layer against a dense one, by routing."""
    from moe_gpt.bench.layer import bench_layer

    work = options.workload(lambda config, _: load_run_config(config))  # of any size: one layer of it is built
    _report(options.json, functools.partial(bench_layer, work, options.rounds, options.steps))


def busy(
    *, processes: Whole = 2, seconds: Whole = 18, others_train: Switch = False, options: Shaped = Shaped()
) -> None:
    """Measure how training keeps up beside other processes that want the same cores.

    Args:
        processes: Number of the others.
        seconds: Duration of each turn.
        others_train: The others train, too, instead of spinning.
    """
    from moe_gpt.bench.busy import bench_busy

    measure = functools.partial(
        bench_busy, options.workload(), processes, seconds, options.rounds, others_train=others_train
    )
    _report(options.json, measure)


def devices(*, processes: Whole = 2, parallel: str = "zero=1", warmup: Whole = 8, options: Shaped = Shaped()) -> None:
    """Measure what several processes gain over one on this machine's cores, and their time in collectives.

    Args:
        processes: Processes, one thread each; one process alone has that many threads.
        parallel: Settings of the section parallel, comma-separated.
        warmup: Steps before the measured ones, in each turn.
    """
    from moe_gpt.bench.devices import bench_devices

    settings = load_run_config("tiny.yaml", [f"parallel.{text}" for text in parallel.split(",") if text]).parallel
    work, turns = options.workload(), (options.rounds, options.steps)
    _report(options.json, functools.partial(bench_devices, work, settings, processes, *turns, warmup=warmup))


def generate(
    *, batch_sizes: str = "1,8,64", new_tokens: Whole = 64, quantize: Switch = False, options: Shaped = Shaped()
) -> None:
    """Measure decoding against transformers on the exported model; on a CPU in float32 by default, as generate does.

    Args:
        batch_sizes: Batch sizes, comma-separated.
        new_tokens: Tokens to decode.
        quantize: Measure bfloat16, int8 and int4 weights instead of transformers.
    """
    from moe_gpt.bench.generate import NAMES, QUANTISED, bench_generate

    sizes = [_count("--batch-sizes", text) for text in batch_sizes.split(",")]
    if options.precision == "auto" and options.place()[0].type == "cpu":
        options = dataclasses.replace(options, precision="fp32")
    measure = functools.partial(bench_generate, options.workload(), sizes, new_tokens, options.rounds)
    _report(options.json, functools.partial(measure, names=QUANTISED if quantize else NAMES))


def serve(
    run: str,
    *,
    only: str = "engine,server,experts,speculation",
    draft: str | None = None,
    rounds: Whole = 5,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Measure serving a run: the engine, the server, the experts that a pass reads, and speculation.

    Args:
        run: A run or a checkpoint, whose held-out text gives the prompts.
        only: Parts to measure, comma-separated.
        draft: A run with the same tokenizer, whose model guesses tokens.
        rounds: Turns that each contender gets.
        json: Write machine and results into this file, too.
        plot: Draw the experts that a pass reads into this file, .svg or .png.
    """
    from moe_gpt.bench import serve as bench

    parts = [part for part in only.split(",") if part]
    results = _report(json, functools.partial(bench.bench_serve, run, parts, draft, rounds))
    if plot:
        bench.plot(results, plot)


def scaling(*, axes: str | None = None, plot: Path | None = None, options: Measurement = Measurement()) -> None:
    """Measure how time and memory grow with experts, width, sequences and their length.

    Args:
        axes: Axes to measure, comma-separated: experts, d_ff, sequences, seq_len, checkpointed, one (sequence, ever
            longer); all by default.
        plot: Draw the results into this file, .svg or .png.
    """
    from moe_gpt.bench import scaling as bench

    chosen, precision = options.place()
    names = axes.split(",") if axes else None
    measure = functools.partial(bench.bench_scaling, str(chosen), precision, options.rounds, options.steps, axes=names)
    results = _report(options.json, measure)
    if plot:
        bench.plot(results, plot)


def data(
    *, config: str = "tiny.yaml", gigabytes: AboveZero = 0.1, folder: Path | None = None, json: Path | None = None
) -> None:
    """Measure preparing text against datasets.map, and reading the stream against training.

    Args:
        config: The config whose tokenizer and training step are used.
        gigabytes: Gigabytes of text to prepare.
        folder: A folder with room for about five times that text; a temporary folder by default.
        json: Write machine and results into this file, too.
    """
    from moe_gpt.bench.data import bench_data

    settings = _fitting(config, Measurement().place()[0])
    with tempfile.TemporaryDirectory(dir=folder) as place:
        _report(json, functools.partial(bench_data, settings, gigabytes, Path(place)))


def loop(*, config: str = "tiny.yaml", steps: Whole = 400, json: Path | None = None) -> None:
    """Measure the time to the first step, and of what a run does besides its steps.

    Args:
        config: The config to train.
        steps: Optimizer steps.
        json: Write machine and results into this file, too.
    """
    from moe_gpt.bench.loop import bench_loop

    settings = _fitting(config, Measurement().place()[0])
    with tempfile.TemporaryDirectory() as place:
        _report(json, functools.partial(bench_loop, settings, steps, Path(place) / "run"))


def gpu(*, minutes: AboveZero = 10, device: Device = "auto", json: Path = Path("bench-gpu.json")) -> bool:
    """Measure what there is to ask of a GPU, unattended, and print one table.

    Args:
        minutes: What all stages may take together.
        device: Where to compute; another device than cuda takes small sizes, to show that everything runs.
        json: Write machine and results into this file, after every result.
    """
    from moe_gpt.bench.gpu import bench_gpu

    failed = bench_gpu(device, minutes, json, functools.partial(print, flush=True))
    print(f"{len(failed)} stages failed: {', '.join(failed)}" if failed else "no stage failed")
    return bool(failed)


def _count(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{flag} must be whole numbers of at least 1, got {text}")
    return int(text)


def _report(path: Path | None, measure: Any) -> list[dict[str, Any]]:
    """Print the machine, measure, and write what came out where a file was named."""
    from moe_gpt.bench.processes import describe_machine

    if path and not path.parent.is_dir():
        raise FileNotFoundError(f"--json {path}: there is no folder {path.parent}")
    machine = describe_machine()
    print(machine, flush=True)
    results = measure(say=functools.partial(print, flush=True))
    if path:
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    return results
