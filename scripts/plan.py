"""Say what a run takes before paying for it: python scripts/plan.py --config gpt4.yaml --n-gpus 25000 --tensor 8."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("plan")
