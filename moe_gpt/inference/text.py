"""The text of an answer while it is made: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from moe_gpt.data.tokenizer import TextDecoder, Tokenizer


class TextStream:
    """Turns tokens into text, and ends the text before the stop string that is completed first.

    Text that may be the beginning of a stop string is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._decoder = TextDecoder(tokenizer, context)
        self._stop = [string for string in stop if string]
        self._held = ""
        self.is_stopped = False
        """Whether a stop string was found."""

    def push(self, token: int) -> str:
        """Return the text that can be shown after one more token."""
        return self._show(self._decoder.push(token))

    def finish(self) -> str:
        """Return what was held back, at the end of the answer."""
        shown = self._show(self._decoder.finish())
        rest, self._held = self._held, ""
        return shown if self.is_stopped else shown + rest

    def _show(self, new: str) -> str:
        if self.is_stopped:
            return ""
        if not self._stop:
            return new
        text = self._held + new
        ends = [(text.find(string) + len(string), -len(string)) for string in self._stop if string in text]
        if ends:
            end, negative_length = min(ends)  # the first completed; of several, the longest
            self.is_stopped, self._held = True, ""
            return text[: end + negative_length]
        n_held = max(_overlap(text, string) for string in self._stop)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest end of a text that begins a string."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if string.startswith(text[len(text) - n :])), 0)
