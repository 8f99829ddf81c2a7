"""What a person sees of something long."""

from __future__ import annotations

import pytest

from moe_gpt.config import SourceConfig
from moe_gpt.data.corpus import ReadingProgress
from moe_gpt.data.prepare import _report
from moe_gpt.terminal import progress
from moe_gpt.terminal.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("max_tokens", "fraction", "left"),
    [(None, None, ""), (None, 0.25, ", about 0:01:30 left"), (100_000, 0.25, ", about 0:00:30 left")],
)
def test_line_now_and_then(clock, max_tokens, fraction, left):
    """Documents, tokens and, where it can be told, the time left; whichever limit comes first counts."""
    said: list[str] = []
    source, reading = SourceConfig(name="web", files="x", max_tokens=max_tokens), ReadingProgress(fraction)
    bar = ProgressBar("web", say=said.append)
    clock[0] += 9
    _report(bar, source, reading, 10, 1000)
    clock[0] += 21
    _report(bar, source, reading, 1234, 50_000)
    _report(bar, source, reading, 1235, 50_100)
    bar.close()
    assert said == [f"tokenising web: 1,234 documents, 50,000 tokens{left}"]


def test_bar_gives_way_to_text_on_a_terminal(monkeypatch, capsys):
    """What is printed stands on lines of its own, whole, and the bar is there again afterwards."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = ProgressBar("training", total=100)
    bar.update(50, "ce_loss 3.2", "never printed")
    bar.say("validation at step 1")
    bar.warn("a spike")
    assert bar._bar.live.is_started
    bar.close()
    out, errors = capsys.readouterr()
    assert out == "validation at step 1\n"
    assert "warning: a spike\n" in errors
    assert "50/100" in errors
    assert "ce_loss 3.2" in errors
    assert "never printed" not in errors
