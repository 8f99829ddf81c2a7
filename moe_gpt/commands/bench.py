"""Measure speed and memory against what users would otherwise take: python scripts/bench.py train."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moe_gpt.commands.cli import ArgumentParser, count_argument, positive_argument
from moe_gpt.config.yaml import load_run_config

if TYPE_CHECKING:
    import torch

    from moe_gpt.bench.contenders import Workload
    from moe_gpt.ops.device import Precision


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, epilog="Machines are noisy: ratios within one call are what counts.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = _command(commands, "data", "preparing text against datasets.map; reading the stream against training")
    data.add_argument("--config", default="tiny.yaml", help="whose tokenizer and training step (default: tiny.yaml)")
    data.add_argument("--gigabytes", type=positive_argument, default=0.1, help="of text to prepare (default: 0.1)")
    data.add_argument("--folder", type=Path, help="where some five times as much fits (default: a temporary folder)")
    loop = _command(commands, "loop", "the time to the first step, and of what a run does besides its steps")
    loop.add_argument("--config", default="tiny.yaml", help="what to train (default: tiny.yaml)")
    loop.add_argument("--steps", type=count_argument, default=400, help="optimizer steps (default: 400)")
    train = _shaped(commands, "train", "whole optimizer steps against peers, in turns")
    train.add_argument("--against", default="transformers,dense", help="comma-separated (default: transformers,dense)")
    train.add_argument("--compile", action="store_true", help="torch.compile, ours by block, the peers' as a whole")
    train.add_argument("--micro-batch-tokens", type=count_argument, help="(default: the whole batch)")
    train.add_argument("--activation-checkpointing", action="store_true", help="ours and the peers'")
    train.add_argument("--tune-peers", action="store_true", help="give them our allocator settings, too")
    _shaped(commands, "layer", "one mixture-of-experts layer against a dense one, by routing")
    generate = _shaped(commands, "generate", "decoding against transformers on the exported model")
    generate.add_argument("--batch-sizes", type=_counts, default="1,8,64", help="comma-separated (default: 1,8,64)")
    generate.add_argument("--new-tokens", type=count_argument, default=64, help="(default: 64)")
    scaling = _command(commands, "scaling", "how time and memory grow with experts, width, sequences and their length")
    _measured(scaling)
    scaling.add_argument(
        "--axes", help="comma-separated, of experts, d_ff, sequences, seq_len, checkpointed (default: all)"
    )
    scaling.add_argument("--plot", type=Path, metavar="FILE", help="draw them, .svg or .png")
    return parser.parse_args()


def _command(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--json", type=Path, metavar="FILE", help="write machine and results there, too")
    return command


def _counts(text: str) -> list[int]:
    return [count_argument(part) for part in text.split(",")]


def _shaped(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    command = _command(commands, name, text)
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--shape", choices=["S", "M", "L"], default="S", help="of docs/benchmarks.md (default: S)")
    shape.add_argument("--config", help="or the model and the last stage of a config")
    _measured(command)
    return command


def _measured(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    command.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="(default: auto)")
    command.add_argument("--rounds", type=count_argument, default=5, help="turns of each contender (default: 5)")
    command.add_argument("--steps", type=count_argument, default=3, help="measurements in a turn (default: 3)")


def main() -> None:
    """Run the measurement that the first argument names."""
    arguments = parse_arguments()

    from moe_gpt.bench.processes import describe_machine

    if arguments.json and not arguments.json.parent.is_dir():
        raise FileNotFoundError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    machine = describe_machine()
    print(machine, flush=True)
    results = RUN[arguments.command](arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def run_data(arguments: argparse.Namespace) -> list[dict]:
    """Prepare a corpus twice, then read it."""
    from moe_gpt.bench.data import bench_data

    config = load_run_config(arguments.config)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return bench_data(config, arguments.gigabytes, Path(folder), _say)


def run_loop(arguments: argparse.Namespace) -> list[dict]:
    """Train under the profiler."""
    from moe_gpt.bench.loop import bench_loop

    with tempfile.TemporaryDirectory() as folder:
        return bench_loop(load_run_config(arguments.config), arguments.steps, Path(folder) / "run", _say)


def run_train(arguments: argparse.Namespace) -> list[dict]:
    """Train every contender for some steps."""
    from moe_gpt.bench.train import bench_train

    workload = dataclasses.replace(
        read_workload(arguments),
        compile=arguments.compile,
        activation_checkpointing=arguments.activation_checkpointing,
        tune_peers=arguments.tune_peers,
    )
    if arguments.micro_batch_tokens:
        workload = dataclasses.replace(workload, micro_batch_tokens=arguments.micro_batch_tokens)
    against = [name for name in arguments.against.split(",") if name]
    return bench_train(workload, against, arguments.rounds, arguments.steps, _say)


def run_layer(arguments: argparse.Namespace) -> list[dict]:
    """Go forward and backward through one layer."""
    from moe_gpt.bench.layer import bench_layer

    return bench_layer(read_workload(arguments), arguments.rounds, arguments.steps, _say)


def run_generate(arguments: argparse.Namespace) -> list[dict]:
    """Decode at several batch sizes."""
    from moe_gpt.bench.generate import bench_generate

    return bench_generate(read_workload(arguments), arguments.batch_sizes, arguments.new_tokens, arguments.rounds, _say)


def run_scaling(arguments: argparse.Namespace) -> list[dict]:
    """Vary one size after another."""
    from moe_gpt.bench.scaling import bench_scaling, plot

    device, precision = pick_place(arguments)
    axes = arguments.axes.split(",") if arguments.axes else None
    results = bench_scaling(str(device), precision, arguments.rounds, arguments.steps, _say, axes)
    if arguments.plot:
        plot(results, arguments.plot)
    return results


def read_workload(arguments: argparse.Namespace) -> Workload:
    """Return shape, device and precision from the command line."""
    from moe_gpt.bench.contenders import SHAPES, Workload, workload_of

    device, precision = pick_place(arguments)
    if arguments.config:
        return workload_of(load_run_config(arguments.config), device, precision)
    model, n_sequences, seq_len = SHAPES[arguments.shape]
    return Workload(model, n_sequences, seq_len, str(device), precision, n_sequences * seq_len)


def pick_place(arguments: argparse.Namespace) -> tuple[torch.device, Precision]:
    """Return device and precision from the command line."""
    from moe_gpt.ops.device import pick_device, pick_precision

    device = pick_device(arguments.device)
    return device, pick_precision(arguments.precision, device)


RUN = {
    "train": run_train,
    "layer": run_layer,
    "generate": run_generate,
    "scaling": run_scaling,
    "data": run_data,
    "loop": run_loop,
}


def _say(text: str) -> None:
    print(text, flush=True)
