"""Answer requests over HTTP: python scripts/serve.py runs/tiny."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("serve")
