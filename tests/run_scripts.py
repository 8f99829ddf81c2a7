"""Running the scripts as the command line does."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as the command line would, but in this process: starting one takes seconds."""
    command = [str(ROOT / "scripts" / name), *map(str, arguments)]
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    status = 0
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as exit_:
            status = exit_.code
    written = [stream.buffer.getvalue().decode() for stream in (out, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(command, status, *written)


def script_in_a_process(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as the command line does."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
