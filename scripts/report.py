"""Write a page about a run, or about several side by side: python scripts/report.py runs/tiny."""

from moe_gpt.commands.app import run

if __name__ == "__main__":
    run("report")
