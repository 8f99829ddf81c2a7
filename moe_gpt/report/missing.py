"""What a run lacks is said in its place: the one way in which a report meets folders that are half there or broken.

Whatever finds a picture, a table or an answer in ``RunRecords`` may assume that everything is there and sound.
``attempt`` calls it and turns what goes wrong into a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_UNREADABLE = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What unexpected values raise on their way into a picture."""


class NotRecorded(ValueError):
    """The run has not recorded what a picture or table needs; the message says what, in words."""


def need(found: Any, otherwise: str) -> None:
    """Raise ``NotRecorded`` with the message ``otherwise`` where nothing was found: false, or empty."""
    if not found:
        raise NotRecorded(otherwise)


def attempt(what: str, find: Callable[..., T], *arguments: Any) -> tuple[T | None, str]:
    """Return what a function finds, and no reason; or None, and a sentence that says why there is no ``what``."""
    try:
        return find(*arguments), ""
    except NotRecorded as error:
        return None, _sentence(str(error))
    except _UNREADABLE as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return None, _sentence(f"{what}; the recorded data cannot be read: {type(error).__name__}, {reason}")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
