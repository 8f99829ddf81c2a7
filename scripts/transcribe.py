"""Speech to text that a model can train on: python scripts/transcribe.py SOUNDS --model FOLDER --out text.jsonl."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("transcribe")
