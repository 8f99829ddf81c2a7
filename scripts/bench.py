"""Measure speed and memory against what users would otherwise take: python scripts/bench.py train."""

from moe_gpt.commands.bench import main
from moe_gpt.commands.cli import run_script

if __name__ == "__main__":
    run_script(main)
