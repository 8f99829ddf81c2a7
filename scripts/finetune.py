"""Train an assistant from a base model: python scripts/finetune.py --config tiny-chat.yaml --init-from runs/tiny."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("finetune")
