"""Measure speed and memory against what users would otherwise take: python scripts/bench.py train."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from moe_gpt.cli import ArgumentParser, count_argument, positive_argument, run_script
from moe_gpt.config_file import load_run_config


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, epilog="Machines are noisy: ratios within one call are what counts.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = _command(commands, "data", "preparing text against datasets.map; reading the stream against training")
    data.add_argument("--config", default="tiny.yaml", help="whose tokenizer and training step (default: tiny.yaml)")
    data.add_argument("--gigabytes", type=positive_argument, default=0.1, help="of text to prepare (default: 0.1)")
    data.add_argument("--folder", type=Path, help="where some five times as much fits (default: a temporary folder)")
    train = _command(commands, "train", "whole optimizer steps against peers, in turns")
    shape = train.add_mutually_exclusive_group()
    shape.add_argument("--shape", choices=["S", "M", "L"], default="S", help="of docs/benchmarks.md (default: S)")
    shape.add_argument("--config", help="or the model and the last stage of a config")
    train.add_argument("--against", default="transformers,dense", help="comma-separated (default: transformers,dense)")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    train.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="(default: auto)")
    train.add_argument("--rounds", type=count_argument, default=5, help="turns of each contender (default: 5)")
    train.add_argument("--steps", type=count_argument, default=3, help="optimizer steps in a turn (default: 3)")
    train.add_argument("--compile", action="store_true", help="torch.compile, ours by block, the peers' as a whole")
    train.add_argument("--micro-batch-tokens", type=count_argument, help="(default: the whole batch)")
    train.add_argument("--activation-checkpointing", action="store_true", help="ours and the peers'")
    train.add_argument("--tune-peers", action="store_true", help="give them our allocator settings, too")
    return parser.parse_args()


def _command(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--json", type=Path, metavar="FILE", help="write machine and results there, too")
    return command


def main() -> None:
    """Run the measurement that the first argument names."""
    arguments = parse_arguments()

    from moe_gpt.bench.processes import describe_machine

    machine = describe_machine()
    print(machine, flush=True)
    results = {"data": run_data, "train": run_train}[arguments.command](arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def run_data(arguments: argparse.Namespace) -> list[dict]:
    """Prepare a corpus twice, then read it."""
    from moe_gpt.bench.data import bench_data

    config = load_run_config(arguments.config)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return bench_data(config, arguments.gigabytes, Path(folder), lambda text: print(text, flush=True))


def run_train(arguments: argparse.Namespace) -> list[dict]:
    """Train every contender for some steps."""
    from moe_gpt.bench.contenders import SHAPES, Workload
    from moe_gpt.bench.train import bench_train
    from moe_gpt.device import pick_device, pick_precision

    if arguments.config:
        config = load_run_config(arguments.config)
        stage = config.schedule.stages[-1]
        vocab_size = config.model.vocab_size or config.data.tokenizer.vocab_size
        model = dataclasses.replace(config.model, vocab_size=vocab_size)
        shape = model, stage.batch_range[1] // stage.seq_len, stage.seq_len
    else:
        shape = SHAPES[arguments.shape]
    model, n_sequences, seq_len = shape
    device = pick_device(arguments.device)
    workload = Workload(
        model,
        n_sequences,
        seq_len,
        str(device),
        pick_precision(arguments.precision, device),
        arguments.micro_batch_tokens or n_sequences * seq_len,
        compile=arguments.compile,
        activation_checkpointing=arguments.activation_checkpointing,
        tune_peers=arguments.tune_peers,
    )
    against = [name for name in arguments.against.split(",") if name]
    return bench_train(workload, against, arguments.rounds, arguments.steps, lambda text: print(text, flush=True))


if __name__ == "__main__":
    run_script(main)
