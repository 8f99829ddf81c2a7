"""Running the scripts as the command line does."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from moe_gpt.commands.app import run

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as the command line would, but in this process: starting one takes seconds."""
    path = str(ROOT / "scripts" / name)
    return _run([path, *map(str, arguments)], lambda: runpy.run_path(path, run_name="__main__"))


def command(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run ``moe-gpt`` in this process."""
    with mock.patch.dict(os.environ, environment):
        return _run(["moe-gpt", *map(str, words)], run)


def _run(words: list[str], main: Callable[[], object]) -> subprocess.CompletedProcess:
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    status = 0
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code
    written = [stream.buffer.getvalue().decode() for stream in (out, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(words, status, *written)


def script_in_a_process(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as the command line does."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def kill_after(n_checkpoints: int, run_dir: Path, name: str, *words: object) -> None:
    """Start a script, and kill it once its run folder has so many checkpoints."""
    script = [sys.executable, ROOT / "scripts" / f"{name}.py", *words, "--run-dir", run_dir]
    process = subprocess.Popen(list(map(str, script)), stdout=subprocess.DEVNULL)
    complete = f"checkpoints/step_{'[0-9]' * 8}/manifest.json"  # a folder that is being written has a longer name
    while len(list(run_dir.glob(complete))) < n_checkpoints:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
