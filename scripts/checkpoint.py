"""Look after a run's checkpoints: python scripts/checkpoint.py list|verify|prune runs/tiny."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("checkpoint")
