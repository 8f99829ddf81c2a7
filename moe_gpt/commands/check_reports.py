"""Write docs/the-report-checked.md: every public claim about GPT-4 beside the value computed here."""

from __future__ import annotations

from pathlib import Path

from moe_gpt.commands.cli import ArgumentParser
from moe_gpt.config.yaml import load_run_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "the-report-checked.md"


def main() -> None:
    """Write the page."""
    ArgumentParser(description=__doc__).parse_args()

    from moe_gpt.files.durable import replace_file
    from moe_gpt.plan.claims import write_page

    replace_file(PAGE, write_page(load_run_config("gpt4")))
    print(f"wrote {PAGE}")
