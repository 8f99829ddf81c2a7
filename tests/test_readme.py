"""The README is true: its paths exist, its example runs, its commands are those that CI runs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from moe_gpt.config.yaml import CONFIGS, find_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_paths_exist():
    """Every file and folder of the repository that the README names is there."""
    named = re.findall(r"(?<![\w/.-])((?:moe_gpt|scripts|configs|tests|docs)/[\w./-]*)", README)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_readme_configs_exist():
    """Every config in a command or the file table is there, and every shipped config is mentioned."""
    for name in re.findall(r"--config (\S+)", README):
        assert find_config(name).parent == CONFIGS
    assert [path.stem for path in CONFIGS.glob("*.yaml") if f"`{path.stem}`" not in README] == []


def test_readme_has_the_two_lines_that_ci_runs():
    """One line trains, one tests; each does all of its own set-up."""
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [line.split()[-1] for line in lines] == ["tiny.yaml", ".venv/bin/pytest"]
    assert all("pip install -e" in line for line in lines)


def test_readme_example_runs():
    """The ten lines with a router of one's own run as they stand and print both routers."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102 (our own text)
    assert [line.split()[0] for line in printed.getvalue().splitlines()] == ["Router", "FrozenRouter"]


def test_readme_stays_short():
    """The README has fewer than 1,200 words."""
    assert len(README.split()) < 1200


def test_documents_name_files_that_are_there():
    """Every file and test that a page of docs/ names exists."""
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/.-])((?:moe_gpt|scripts|configs|tests|docs)/[\w./-]*\w)", text)
        assert [path for path in named if not (ROOT / path).exists()] == [], page.name
        tests = re.findall(r"(?<![\w/])test_\w+\.py", text)
        assert [name for name in tests if not any((ROOT / "tests").rglob(name))] == [], page.name
