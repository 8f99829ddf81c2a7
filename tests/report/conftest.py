"""Pictures are drawn in every test, and rendered, which takes most of the time, only where a test asks for it."""

from __future__ import annotations

import pytest

from moe_gpt.report import pictures
from moe_gpt.report.recorded import RunRecords
from moe_gpt.report.report import write_report


@pytest.fixture
def rendered():
    """Ask for real SVG and PNG."""


@pytest.fixture(autouse=True)
def _render_on_request(request, monkeypatch):
    if "rendered" not in request.fixturenames:
        svg = "<svg xmlns='x' width='1pt' height='1pt'></svg>"
        monkeypatch.setattr(pictures, "render", lambda figure, name: (svg, b"png"))


@pytest.fixture
def page_of(tmp_path):
    """Return a function that gives the page of runs."""

    def page_of(*runs: RunRecords) -> str:
        write_report(runs, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return page_of
