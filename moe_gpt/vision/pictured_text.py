"""Text with pictures in it, as tokens.

Each picture takes the place of a line end: an ordinary token, which the text model knows. Which line ends stand for
pictures is told apart from the tokens, so no text can pretend to have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.vision.pictures import check_picture, open_picture

MARKER = "<image>"
"""Stands for a picture in a prompt that is a text."""


class Drawable(Protocol):
    """A picture that is read, or drawn, when it is needed."""

    def pixels(self, size: int) -> UInt8[Tensor, "3 size size"]:
        """Return it, fitted into a square."""


class PictureFile(NamedTuple):
    """A picture in a file, or the bytes of one."""

    source: str | bytes
    place: str
    """What names it in messages: the file and row that have it."""
    digest: str = ""
    """SHA-256 of the file, once it is checked."""

    def checked(self) -> tuple[PictureFile, tuple[str, ...]]:
        """Return it with its digest after reading all of it, and remarks; raise ``InputError`` as ``pixels`` does."""
        try:
            digest, remarks = check_picture(self.source)
        except InputError as error:
            raise InputError(f"{self.place}: {error}") from None
        return self._replace(digest=digest), remarks

    def pixels(self, size: int) -> UInt8[Tensor, "3 size size"]:
        """Return it, fitted into a square; raise ``InputError`` with its place where it cannot be read."""
        try:
            return open_picture(self.source, size).pixels
        except InputError as error:
            raise InputError(f"{self.place}: {error}") from None


Picture = TypeVar("Picture")


class PicturedText(NamedTuple, Generic[Picture]):
    """The tokens of a text with pictures."""

    ids: list[int]
    is_answer: list[bool]
    """Whether a token is learnt."""
    places: list[int]
    """Of the tokens that stand for pictures, one for each, ascending."""
    pictures: list[Picture]

    def then(self, other: PicturedText[Picture]) -> PicturedText[Picture]:
        """Return this text with another one behind it."""
        places = [len(self.ids) + place for place in other.places]
        return PicturedText(
            self.ids + other.ids, self.is_answer + other.is_answer, self.places + places, self.pictures + other.pictures
        )


def plain(ids: list[int], is_answer: bool = False) -> PicturedText[Picture]:
    """Return tokens without pictures."""
    return PicturedText(ids, [is_answer] * len(ids), [], [])


def spell(pieces: Iterable[str | Picture], tokenizer: Tokenizer, special_tokens: bool = False) -> PicturedText[Picture]:
    """Return the tokens of pieces of text, each encoded apart, and of the pictures between them.

    Args:
        pieces: texts, and pictures of any type that is not text.
        tokenizer: has a token for a line end.
        special_tokens: read special tokens that texts spell as those tokens.

    Raises:
        InputError: where the tokenizer makes no token of a line end.
    """
    line_end, encode = tokenizer.encode("\n"), tokenizer.encode
    if special_tokens:
        encode = tokenizer.encode_with_special_tokens
    if not line_end:
        raise InputError("the tokenizer must have a token for a line end, whose place a picture takes")
    result: PicturedText[Picture] = plain([])
    for piece in pieces:
        if isinstance(piece, str):
            result = result.then(plain(encode(piece)))
        else:
            result = result.then(PicturedText(line_end, [False] * len(line_end), [0], [piece]))
    return result


def picture_mask(places: Sequence[Sequence[int]], length: int) -> Bool[Tensor, "B T"]:
    """Return which tokens of a batch stand for pictures."""
    mask = torch.zeros(len(places), length, dtype=torch.bool)
    for row, of_row in zip(mask, places, strict=True):
        row[torch.tensor(of_row, dtype=torch.long)] = True
    return mask


class Row(NamedTuple):
    """A text to learn from: the answers in it, after the pictures."""

    text: PicturedText
    place: str
    """What names it in messages: file and row."""

    @property
    def end(self) -> int:
        """Where the token that ends its last answer is."""
        return len(self.text.is_answer) - 1 - self.text.is_answer[::-1].index(True)

    @property
    def start(self) -> int:
        """Where its last answer begins."""
        before = self.text.is_answer[: self.end][::-1]
        return self.end - before.index(False) if False in before else 0

    @property
    def prompt(self) -> list[int]:
        """The tokens before its last answer."""
        return self.text.ids[: self.start]

    @property
    def answer(self) -> list[int]:
        """The tokens of its last answer, without its end."""
        return self.text.ids[self.start : self.end]

    @property
    def question(self) -> list[int]:
        """The tokens of the prompt from the last picture on."""
        return self.text.ids[self.text.places[-1] : self.start]
