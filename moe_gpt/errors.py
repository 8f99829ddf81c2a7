"""What is raised for bad input, and how a value is shown in a message."""

from __future__ import annotations

import reprlib
from typing import Any


class InputError(ValueError):
    """Something a person gave (a setting, a file, an argument) cannot be used. Scripts exit with status 2."""


class ConfigError(InputError):
    """One or more settings are wrong; ``problems`` has one line for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def shown(value: Any) -> str:
    """Return a value for an error message; what is long or deep is cut, as a stranger's file may be either."""
    return _shortened.repr(value)


_shortened = reprlib.Repr()
_shortened.maxlevel, _shortened.maxlist, _shortened.maxtuple, _shortened.maxdict = 4, 8, 8, 8
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 200
