"""Continue a prompt: python scripts/generate.py runs/tiny --prompt "def "."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("generate")
