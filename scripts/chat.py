"""Talk to a model: python scripts/chat.py runs/tiny-chat."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("chat")
