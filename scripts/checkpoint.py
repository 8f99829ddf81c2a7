"""Look after a run's checkpoints: python scripts/checkpoint.py list|verify|prune runs/tiny."""

from moe_gpt.commands.checkpoint import main
from moe_gpt.commands.cli import run_script

if __name__ == "__main__":
    run_script(main)
