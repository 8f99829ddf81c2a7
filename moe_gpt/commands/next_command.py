"""Commands that are printed for people to copy: they run as printed, from where the user stands."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from moe_gpt.terminal.wrapping import typed

_SCRIPTS = {"prepare": "prepare_data"}
"""Commands whose script has another name."""


def command_line(command: str, *words: object) -> str:
    """Return a command, quoted where needed, that is started in the way in which this one was."""
    return shlex.join([*_start(command), *map(typed, words)])


def repeated(command: str, *added: str) -> str:
    """Return the command line that this process was started with, with words added that it does not have."""
    words = sys.argv[1:] if _is_script() else sys.argv[2:]
    return command_line(command, *words, *(word for word in added if word not in words))


def _start(command: str) -> list[str]:
    program = sys.argv[0]
    if _is_script():
        script = Path(program).with_name(f"{_SCRIPTS.get(command, command)}.py")
        return [_python(), str(script)]
    installed = shutil.which("moe-gpt")
    if Path(program).name.startswith("moe-gpt"):
        is_on_path = installed is not None and os.path.abspath(installed) == os.path.abspath(program)
        return ["moe-gpt" if is_on_path else program, command]
    is_ours = installed is not None and Path(installed).parent == Path(sys.executable).parent
    return ["moe-gpt", command] if is_ours else [_python(), "-m", "moe_gpt", command]


def _is_script() -> bool:
    """Whether this process is one of scripts/*.py."""
    return Path(sys.argv[0]).parent.name == "scripts" and sys.argv[0].endswith(".py")


def _python() -> str:
    """Return how to start this Python: by its name where that finds it, by a short path where there is one."""
    for name in ("python", Path(sys.executable).name):
        found = shutil.which(name)
        if found is not None and os.path.abspath(found) == os.path.abspath(sys.executable):
            return name
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else os.path.join(os.curdir, relative)
