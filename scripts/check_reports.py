"""Write docs/the-report-checked.md: every public claim about GPT-4 beside the value computed here."""

from moe_gpt.commands.check_reports import main
from moe_gpt.commands.cli import run_script

if __name__ == "__main__":
    run_script(main)
