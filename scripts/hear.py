"""A model from speech to text, trained from scratch on synthesised speech: python scripts/hear.py FOLDER."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("hear")
