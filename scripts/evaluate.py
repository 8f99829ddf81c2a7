"""Print loss, perplexity and bits per byte on held-out text, or on any: python scripts/evaluate.py runs/tiny."""

from moe_gpt.commands.cli import run_script
from moe_gpt.commands.evaluate import main

if __name__ == "__main__":
    run_script(main)
