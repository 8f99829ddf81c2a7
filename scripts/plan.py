"""Say what a run takes before paying for it: python scripts/plan.py --config gpt4.yaml --n-gpus 25000 --tensor 8."""

from moe_gpt.commands.cli import run_script
from moe_gpt.commands.plan import main

if __name__ == "__main__":
    run_script(main)
