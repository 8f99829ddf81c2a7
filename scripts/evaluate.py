"""Print loss, perplexity and bits per byte on held-out text, or on any: python scripts/evaluate.py runs/tiny."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("evaluate")
