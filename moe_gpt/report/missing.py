"""What a run lacks is said in its place: the one way in which a report meets folders that are half there or broken.

Whatever finds a picture, a table or an answer in ``RunRecords`` may assume that everything is there and sound.
``attempt`` calls it and turns what goes wrong into a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from moe_gpt.report.run_records import RunRecords

T = TypeVar("T")
_UNREADABLE = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What unexpected values raise on their way into a picture."""


class NotRecorded(ValueError):
    """The run has not recorded what a picture or table needs; the message says what, in words."""


def need(found: Any, otherwise: str) -> None:
    """Refuse to go on without something.

    Args:
        found: what must be there: true, or not empty.
        otherwise: the message of ``NotRecorded``.
    """
    if not found:
        raise NotRecorded(otherwise)


def attempt(find: Callable[[RunRecords], T], run: RunRecords) -> tuple[T | None, str]:
    """Return what ``find`` makes of a run, and no reason; or None, and a sentence that says why."""
    try:
        return find(run), ""
    except NotRecorded as error:
        return None, sentence(str(error))
    except _UNREADABLE as error:
        what = find.__name__.removeprefix("draw_").strip("_").replace("_", " ")
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return None, sentence(f"{what}; what was recorded cannot be read: {type(error).__name__}, {reason}")


def sentence(text: str) -> str:
    """Return words as a sentence."""
    return text[:1].upper() + text[1:].rstrip(".") + "."
