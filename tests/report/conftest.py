"""Pictures are drawn in every test, and rendered, which takes most of the time, only where a test asks for it."""

from __future__ import annotations

import pytest

from moe_gpt.report import pictures


@pytest.fixture
def rendered():
    """Ask for real SVG and PNG."""


@pytest.fixture(autouse=True)
def _render_on_request(request, monkeypatch):
    if "rendered" not in request.fixturenames:
        svg = "<svg xmlns='x' width='1pt' height='1pt'></svg>"
        monkeypatch.setattr(pictures, "render", lambda figure, name: (svg, b"png"))
