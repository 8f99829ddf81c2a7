"""Write a model as a Hugging Face folder: python scripts/export.py runs/tiny exported/tiny."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("export")
