"""Watching runs: the page is renewed while one trains, and only then."""

from __future__ import annotations

import json

import filelock
import pytest
import yaml
from made_up_run import MODEL, make_step

from moe_gpt.errors import InputError
from moe_gpt.report import watch
from moe_gpt.report.run_records import is_training, read_run
from moe_gpt.report.watch import watch_report


@pytest.fixture
def run_dir(tmp_path):
    """A run of three steps, whose lock is free."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(make_step(step)) + "\n" for step in range(1, 4)))
    (folder / ".lock").touch()
    return folder


def add_step(run_dir, step):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(make_step(step)) + "\n")


def test_who_holds_the_lock_trains(run_dir):
    """A held lock is seen, a free one is left free, and none is made."""
    assert not read_run(run_dir).is_training
    with filelock.FileLock(run_dir / ".lock").acquire(timeout=0):
        assert read_run(run_dir).is_training
    assert not is_training(run_dir)
    (run_dir / ".lock").unlink()
    assert not is_training(run_dir)
    assert not (run_dir / ".lock").exists()


def test_page_is_renewed_while_a_run_trains(run_dir, tmp_path, monkeypatch):
    """A page for each change of the files, which loads itself anew; the last one, after the end, does not."""
    page, said, pages = tmp_path / "page.html", [], []
    lock = filelock.FileLock(run_dir / ".lock")
    lock.acquire(timeout=0)

    def sleep(seconds):
        pages.append(page.read_text())
        if len(pages) == 2:
            add_step(run_dir, 4)
        if len(pages) == 3:
            lock.release()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch_report([run_dir], page, 7, said.append)
    assert len(said) == 3  # the second look found nothing new
    assert all('http-equiv="refresh" content="7"' in text and "still training" in text for text in pages)
    assert "in 3 steps" in pages[1]
    assert "in 4 steps" in pages[2]
    assert "refresh" not in page.read_text()
    assert "still training" not in page.read_text()


def test_interrupt_leaves_the_last_page(run_dir, tmp_path, monkeypatch):
    """Ctrl-C while a run trains ends the watching, not the run; the page does not load itself anew any more."""

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    with filelock.FileLock(run_dir / ".lock").acquire(timeout=0):
        watch_report([run_dir], tmp_path / "page.html", 5, lambda text: None)
    page = (tmp_path / "page.html").read_text()
    assert "refresh" not in page
    assert "still training" in page


def test_watching_a_run_that_has_ended_writes_one_page(run_dir, tmp_path):
    """There is nothing to wait for; and what is no run is refused."""
    said = []
    watch_report([run_dir], tmp_path / "page.html", 5, said.append)
    assert len(said) == 1
    with pytest.raises(InputError, match="nowhere"):
        watch_report([tmp_path / "nowhere"], tmp_path / "page.html", 5, said.append)
