"""Continue a prompt: python scripts/generate.py runs/tiny --prompt "def "."""

from moe_gpt.commands.cli import run_script
from moe_gpt.commands.generate import main

if __name__ == "__main__":
    run_script(main)
