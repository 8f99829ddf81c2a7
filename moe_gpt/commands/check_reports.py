"""Write docs/the-report-checked.md: every public claim about GPT-4 beside the value computed here."""

from __future__ import annotations

from pathlib import Path

from moe_gpt.cli import ArgumentParser, run_script
from moe_gpt.config_file import load_run_config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "the-report-checked.md"


def main() -> None:
    """Write the page."""
    ArgumentParser(description=__doc__).parse_args()

    from moe_gpt.analysis.reported import write_page
    from moe_gpt.durable import replace_file

    replace_file(PAGE, write_page(load_run_config("gpt4")))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    run_script(main)
