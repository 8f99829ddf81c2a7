"""Arms, seeds and comparisons over ordinary runs: python scripts/study.py run quick.yaml."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("study")
