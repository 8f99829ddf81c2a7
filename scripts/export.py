"""Write a model as a Hugging Face folder: python scripts/export.py runs/tiny exported/tiny."""

from moe_gpt.commands.cli import run_script
from moe_gpt.commands.export import main

if __name__ == "__main__":
    run_script(main)
