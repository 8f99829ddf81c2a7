"""What a person sees while a source is prepared."""

from __future__ import annotations

import pytest

from moe_gpt.config import SourceConfig
from moe_gpt.data import progress
from moe_gpt.data.corpus import ReadingProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(clock, max_tokens: int | None, fraction: float | None) -> list[str]:
    """Return what is said of a source half a minute after it began."""
    said: list[str] = []
    source = SourceConfig(name="web", files="x", max_tokens=max_tokens)
    with progress.show_progress(source, ReadingProgress(fraction), said.append) as report:
        clock[0] += 9
        report(10, 1000)
        clock[0] += 21
        report(1234, 50_000)
        report(1235, 50_100)
    return said


@pytest.mark.parametrize(
    ("max_tokens", "fraction", "left"),
    [(None, None, ""), (None, 0.25, ", about 0:01:30 left"), (100_000, 0.25, ", about 0:00:30 left")],
)
def test_line_now_and_then(clock, max_tokens, fraction, left):
    """Documents, tokens and, where it can be told, the time left; whichever limit comes first counts."""
    assert lines(clock, max_tokens, fraction) == [f"tokenising web: 1,234 documents, 50,000 tokens{left}"]
