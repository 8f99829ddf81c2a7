"""Train a mixture-of-experts decoder: python scripts/train.py --config tiny.yaml."""

from moe_gpt.commands.cli import run_script
from moe_gpt.commands.train import main

if __name__ == "__main__":
    run_script(main)
