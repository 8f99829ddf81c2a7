"""Write a page about a run, or about several side by side: python scripts/report.py runs/tiny."""

from moe_gpt.commands.cli import run_script
from moe_gpt.commands.report import main

if __name__ == "__main__":
    run_script(main)
