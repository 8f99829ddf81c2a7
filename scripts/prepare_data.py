"""Tokenise a config's sources ahead of training, and show what the model will see."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("prepare")
