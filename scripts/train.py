"""Train a mixture-of-experts decoder: python scripts/train.py --config tiny.yaml."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("train")
