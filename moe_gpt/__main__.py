"""``python -m moe_gpt``: the command ``moe-gpt``."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run()
