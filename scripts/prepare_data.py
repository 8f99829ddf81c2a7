"""Tokenise a config's sources ahead of training, and show what the model will see."""

from moe_gpt.commands.cli import run_script
from moe_gpt.commands.prepare import main

if __name__ == "__main__":
    run_script(main)
