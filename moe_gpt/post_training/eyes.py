"""Pictures for a model in use: files and messages with pictures become what the engine is asked.

Texts with pictures are spelled as in training (``pictured``). A picture is decoded and encoded once; its features are
kept while it is among the latest, so the next turn of a conversation does not encode it again.
"""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError, shown
from moe_gpt.post_training.chat import TURN_END, TURN_START, Message
from moe_gpt.post_training.conversations import checked_messages
from moe_gpt.post_training.pictured import render_pictured
from moe_gpt.vision.pictured_text import MARKER, PicturedText, plain, spell
from moe_gpt.vision.pictures import MAX_PIXELS, is_data_url, open_picture, read_data_url
from moe_gpt.vision.seeing import SeeingModel
from moe_gpt.vision.shown import ShownPictures, encode

_KEPT = 64
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Opened(NamedTuple):
    """A picture in the model's size."""

    pixels: UInt8[Tensor, "3 size size"]
    digest: str
    remarks: tuple[str, ...] = ()
    """What of the file is not in the pixels."""


Source = str | Path | bytes | Opened
"""A picture: a path, a data URL, a file's bytes, or what was opened before."""


class Looked(NamedTuple):
    """What the engine is asked: tokens, and the pictures beside them."""

    ids: list[int]
    beside: ShownPictures | None = None


class Eyes:
    """Opens pictures for a model. Any thread may use it; one picture at a time is decoded, so that memory is bounded.

    Args:
        model: encodes the pictures.
        tokenizer: of the model.
    """

    def __init__(self, model: SeeingModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def has_turns(self) -> bool:
        """Whether the model was trained with marks of turns; else with prompts and texts that follow them."""
        return self.tokenizer.special_id(TURN_START) is not None

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        turn = self.tokenizer.special_id(TURN_END)
        return [self.tokenizer.end_of_text_id] + ([] if turn is None else [turn])

    def open(self, source: Source, max_pixels: int = MAX_PIXELS) -> Opened:
        """Return a picture; raise ``InputError`` for what cannot be read, is too large, or lies elsewhere."""
        if isinstance(source, Opened):
            return source
        if isinstance(source, str) and is_data_url(source):
            source = read_data_url(source)
        if isinstance(source, str) and _ELSEWHERE.match(source):
            raise InputError(f"a picture must be a path or a data URL, got {shown(source)}, which is not fetched")
        if not isinstance(source, str | Path | bytes):
            raise InputError(f"a picture must be a path, a data URL or bytes, got {type(source).__name__}")
        with self._lock:
            picture = open_picture(source, self.model.settings.side, max_pixels)
        digest = hashlib.sha256(picture.pixels.numpy().tobytes()).hexdigest()
        return Opened(picture.pixels, digest, picture.remarks)

    def features(self, pictures: Sequence[Opened]) -> Float[Tensor, "P S Dv"]:
        """Return the features of pictures."""
        with self._lock:
            return torch.stack([self._features_of(picture) for picture in pictures])

    def _features_of(self, picture: Opened) -> Float[Tensor, "S Dv"]:
        if picture.digest not in self._features:
            self._features[picture.digest] = encode(self.model, [picture.pixels])[0]
        self._features.move_to_end(picture.digest)
        while len(self._features) > _KEPT:
            self._features.popitem(last=False)
        return self._features[picture.digest]

    def shown(self, text: PicturedText[Opened]) -> ShownPictures | None:
        """Return the pictures of a text for the engine; None where it has none."""
        if not text.pictures:
            return None
        digest = hashlib.sha256("".join(picture.digest for picture in text.pictures).encode()).hexdigest()
        return ShownPictures(self.features(text.pictures), text.places, digest)

    def read_prompt(
        self, prompt: str, pictures: Sequence[Opened], start: Sequence[int] = (), special_tokens: bool = False
    ) -> Looked:
        """Return a prompt that a text follows, with its pictures at its markers.

        Args:
            prompt: with a marker for each picture; without markers, the pictures come first.
            pictures: at least one.
            start: tokens before all others.
            special_tokens: read special tokens that the prompt spells as those tokens.

        Raises:
            InputError: where the numbers of markers and pictures differ.
        """
        text = _plain(start).then(spell(pieces_of(prompt, pictures), self.tokenizer, special_tokens))
        return Looked(text.ids, self.shown(text))

    def spell_conversation(self, messages: Sequence[Message]) -> PicturedText[Opened]:
        """Return the tokens of messages that wait for an answer.

        Args:
            messages: from ``take_pictures``.

        Raises:
            InputError: for a system's message, where the model knows no turns.
        """
        if self.has_turns:
            return render_pictured(messages, self.tokenizer, add_generation_prompt=True)
        text: PicturedText[Opened] = plain([])
        for message in messages:
            text = text.then(self._spell_row(message))
        return text

    def _spell_row(self, message: Message) -> PicturedText[Opened]:
        content = message.get("content") or ""
        if message["role"] == "assistant":
            return plain([*self.tokenizer.encode(str(content)), self.tokenizer.end_of_text_id])
        if message["role"] != "user":
            raise InputError(
                f"this model was trained without turns: it knows questions and answers, got a message of "
                f"{message['role']}; leave it out"
            )
        return spell([content] if isinstance(content, str) else content, self.tokenizer)

    def take_pictures(self, messages: Any, open_one: Callable[[Source], Opened] | None = None) -> list[Message]:
        """Return checked messages whose pictures are open, as ``spell_conversation`` wants them.

        Args:
            messages: of OpenAI's form; the content of a user's message may be a list of parts of type text, image_url
                (``{"image_url": {"url": ...}}``) and image (``{"image": ...}``, or url or path as in rows of files).
            open_one: opens a picture; ``open`` by default.

        Raises:
            InputError: naming the message and the part that cannot be used.
        """
        given = messages if isinstance(messages, list | tuple) else [messages]
        parts = [_parts_of(message, f"messages.{index}") for index, message in enumerate(given)]
        without = [_without_pictures(*pair) for pair in zip(given, parts, strict=True)]
        checked = checked_messages(without if isinstance(messages, list | tuple) else messages)
        return [
            {**message, "content": [self._open_part(part, open_one or self.open) for part in of_message]}
            if of_message
            else message
            for message, of_message in zip(checked, parts, strict=True)
        ]

    def _open_part(self, part: _Part, open_one: Callable[[Source], Opened]) -> str | Opened:
        if isinstance(part.value, str) and part.is_text:
            return part.value
        try:
            return open_one(part.value)
        except InputError as error:
            raise InputError(f"{part.key}: {error}") from None


def has_pictures(messages: Any) -> bool:
    """Return whether any of messages has a part that is a picture."""
    given = messages if isinstance(messages, list | tuple) else []
    contents = [message.get("content") for message in given if isinstance(message, dict)]
    return any(_is_picture(part) for content in contents if isinstance(content, list) for part in content)


class _Part(NamedTuple):
    """A part of a message with pictures."""

    key: str
    value: Any
    is_text: bool


def _parts_of(message: Any, key: str) -> list[_Part]:
    """Return the parts of a message that has pictures; none for others."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not any(_is_picture(part) for part in content):
        return []
    if message.get("role") != "user":
        raise InputError(f"{key}: only a user's message may have pictures, got one of {shown(message.get('role'))}")
    return [_part(part, f"{key}.content.{index}") for index, part in enumerate(content)]


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _part(part: Any, key: str) -> _Part:
    if not _is_picture(part):
        return _Part(f"{key}.text", part.get("text") if isinstance(part, dict) else part, True)
    name = part["type"]
    value = next((part[each] for each in (name, "url", "path") if part.get(each) is not None), None)
    if isinstance(value, dict) and name == "image_url":
        value, name = value.get("url"), "image_url.url"
    if value is None:
        raise InputError(f"{key}.{name} must be a picture, got none")
    return _Part(f"{key}.{name}", value, False)


def _without_pictures(message: Any, parts: Sequence[_Part]) -> Any:
    """Return a message with texts alone, for the checks of its other parts."""
    if not parts:
        return message
    return {**message, "content": [part for part in message["content"] if not _is_picture(part)]}


def pieces_of(text: str, pictures: Sequence[Opened]) -> list[str | Opened]:
    """Return a text cut at its markers, with a picture at each; without markers, the pictures come first.

    Raises:
        InputError: where the numbers of markers and pictures differ.
    """
    parts = text.split(MARKER)
    if len(parts) == 1:
        return [*pictures, *([text] if text else [])]
    if len(parts) - 1 != len(pictures):
        raise InputError(
            f"the text has {MARKER} {len(parts) - 1} times, the number of pictures is {len(pictures)}; write one "
            f"{MARKER} for each picture, or none, and the pictures come first"
        )
    pieces: list[str | Opened] = [parts[0]]
    for picture, part in zip(pictures, parts[1:], strict=True):
        pieces += [picture, part]
    return [piece for piece in pieces if piece != ""]


def _plain(ids: Sequence[int]) -> PicturedText[Opened]:
    return plain(list(ids))


def open_all(eyes: Eyes, images: Sequence[Source]) -> list[Opened]:
    """Return pictures, and warn of what of them is not in the pixels."""
    if isinstance(images, str | Path | bytes):
        raise InputError("images must be a list of pictures, got one alone; put it into a list")
    pictures = [eyes.open(image) for image in images]
    for picture, image in zip(pictures, images, strict=True):
        for remark in picture.remarks if picture is not image else ():
            name = "the picture" if isinstance(image, bytes) else str(image)[:200]
            warnings.warn(f"{name}: {remark}", stacklevel=4)
    return pictures
