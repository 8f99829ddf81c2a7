"""Write docs/the-report-checked.md: every public claim about GPT-4 beside the value computed here."""

from pathlib import Path

from moe_gpt.commands.app import run_main
from moe_gpt.config.yaml import load_run_config
from moe_gpt.files.durable import replace_file
from moe_gpt.plan.claims import write_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "the-report-checked.md"


def main() -> None:
    """Write the page."""
    replace_file(PAGE, write_page(load_run_config("gpt4")))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    run_main(main)
