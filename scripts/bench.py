"""Measure speed and memory against what users would otherwise take: python scripts/bench.py train."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("bench")
