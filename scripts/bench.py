"""Measure speed and memory against what users would otherwise take: python scripts/bench.py data."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from moe_gpt.cli import ArgumentParser, positive_argument, run_script
from moe_gpt.config_file import load_run_config


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, epilog="Machines are noisy: ratios within one call are what counts.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = _command(commands, "data", "preparing text against datasets.map; reading the stream against training")
    data.add_argument("--config", default="tiny.yaml", help="whose tokenizer and training step (default: tiny.yaml)")
    data.add_argument("--gigabytes", type=positive_argument, default=0.1, help="of text to prepare (default: 0.1)")
    data.add_argument("--folder", type=Path, help="where some five times as much fits (default: a temporary folder)")
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
    results = {"data": run_data}[arguments.command](arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def run_data(arguments: argparse.Namespace) -> list[dict]:
    """Prepare a corpus twice, then read it."""
    from moe_gpt.bench.data import bench_data

    config = load_run_config(arguments.config)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return bench_data(config, arguments.gigabytes, Path(folder), lambda text: print(text, flush=True))


if __name__ == "__main__":
    run_script(main)
