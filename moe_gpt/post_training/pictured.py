"""Rows of text with pictures: from jsonl files, or made offline.

A row of a file is ``{"images": [...], "prompt": "<image> ...", "text": ...}``; or a conversation whose user turns have
parts, ``{"type": "image", "image": ...}`` or OpenAI's ``image_url`` beside text. A picture is a path, relative to the
file, or a data URL. For a model with a chat template, prompt and text are a turn each; else the text follows the
prompt, and end-of-text follows it.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError, shown
from moe_gpt.post_training.chat import TURN_END, TURN_START, Message, mark, render
from moe_gpt.post_training.conversations import Unfit, checked_conversation, checked_text, read_rows, require
from moe_gpt.vision.examples import Example
from moe_gpt.vision.pictured_text import MARKER, Picture, PicturedText, PictureFile, Row, plain, spell
from moe_gpt.vision.pictures import check_picture

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,(.*)", re.DOTALL)
_ELSEWHERE = re.compile(r"[a-z]+://", re.IGNORECASE)


class FoundRows(NamedTuple):
    """The rows of files."""

    rows: list[Row]
    remarks: dict[str, int]
    """What of their pictures is not quite in the pixels, and of how many."""


def read_pictured(paths: Sequence[Path], tokenizer: Tokenizer) -> FoundRows:
    """Return the rows of jsonl files. Their pictures must be there, with a header that can be read; they are read later.

    Raises:
        InputError: naming file, row and picture of the first that cannot be used.
    """
    rows, remarks = list[Row](), dict[str, int]()
    for path in paths:
        read = functools.partial(_row, folder=path.parent, tokenizer=tokenizer, remarks=remarks)
        for place, text in read_rows([path], read):
            named = [picture._replace(place=f"{place}: {picture.place}") for picture in text.pictures]
            rows.append(Row(text._replace(pictures=named), place))
    return FoundRows(rows, remarks)


def row_of(example: Example, tokenizer: Tokenizer) -> Row:
    """Return the row of an example that is made offline."""
    return Row(_asked(_split(example.prompt, example.pictures), example.text, tokenizer), example.prompt)


def render_pictured(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> PicturedText[Any]:
    """Return the tokens of a conversation, as ``render`` does, with pictures.

    Args:
        messages: the content of a turn may be a list of texts and pictures, where anything that is no text is a picture.
        tokenizer: knows the special tokens of conversations.
        add_generation_prompt: end with the header of an answer.
    """
    result: PicturedText[Any] = plain([])
    for message in messages:
        has_pictures = isinstance(message.get("content"), list)
        result = result.then(_turn(message, tokenizer) if has_pictures else _of_text([message], tokenizer))
    return result.then(_of_text([], tokenizer, True)) if add_generation_prompt else result


def _of_text(messages: Sequence[Message], tokenizer: Tokenizer, add_prompt: bool = False) -> PicturedText[Any]:
    return PicturedText(*render(messages, tokenizer, add_prompt), [], [])


def _turn(message: Message, tokenizer: Tokenizer) -> PicturedText[Any]:
    """Return a turn whose content has pictures, and is no answer; blanks around the content are left out."""
    ids = render([{"role": message["role"], "content": ""}], tokenizer).ids
    at, pieces = ids.index(mark(TURN_END, tokenizer)), [*message["content"]]
    if isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return plain(ids[:at]).then(spell(pieces, tokenizer)).then(plain(ids[at:]))


def _split(prompt: str, pictures: Sequence[Picture]) -> list[str | Picture]:
    """Return the pieces of a prompt with its pictures at the markers, of which there are as many."""
    first, *others = prompt.split(MARKER)
    pieces = [first, *(piece for pair in zip(pictures, others, strict=True) for piece in pair)]
    return [piece for piece in pieces if piece != ""]


def _asked(pieces: list[str | Picture], answer: str, tokenizer: Tokenizer) -> PicturedText[Picture]:
    """Return a prompt and its answer."""
    if tokenizer.special_id(TURN_START) is not None:
        messages: list[Message] = [{"role": "user", "content": pieces}, {"role": "assistant", "content": answer}]
        return render_pictured(messages, tokenizer)
    return spell(pieces, tokenizer).then(plain([*tokenizer.encode(answer), tokenizer.end_of_text_id], True))


def _row(row: dict[str, Any], folder: Path, tokenizer: Tokenizer, remarks: dict[str, int]) -> PicturedText[PictureFile]:
    images = row.get("images", [row["image"]] if "image" in row else [])
    require(isinstance(images, list), f"images must be a list of paths or data URLs, got {shown(images)}")
    open_one = functools.partial(_picture, folder=folder, remarks=remarks)
    pictures = [open_one(image, f"images.{index}") for index, image in enumerate(images)]
    if "prompt" not in row and ("messages" in row or "conversations" in row):
        text = _conversation(row, pictures, open_one, tokenizer)
    else:
        text = _prompt_and_text(row, pictures, tokenizer)
    require(text.pictures, "it has no picture, and of text alone nothing is learnt here; leave the row out")
    return text


def _prompt_and_text(
    row: Mapping[str, Any], pictures: list[PictureFile], tokenizer: Tokenizer
) -> PicturedText[PictureFile]:
    missing = [key for key in ("images", "prompt", "text") if key not in row]
    require(not missing, f"it must have images, prompt and text, or messages; {', '.join(missing)} is missing")
    prompt, answer = (checked_text(row[key], key) for key in ("prompt", "text"))
    require(answer.strip(), "text must be an answer, got an empty text: no answer to learn from")
    return _asked(_split(_with_markers(prompt, len(pictures), "prompt"), pictures), answer, tokenizer)


def _with_markers(text: str, n_pictures: int, key: str) -> str:
    """Return a text with a marker for each picture: those that it has, or as many before it."""
    n_markers = text.count(MARKER)
    if not n_markers:
        return MARKER * n_pictures + text
    what = f"{key} has {n_markers} {MARKER}, and images has {n_pictures}"
    require(n_markers == n_pictures, f"{what}; there must be one {MARKER} for each picture, or none")
    return text


def _picture(source: Any, key: str, folder: Path, remarks: dict[str, int]) -> PictureFile:
    require(isinstance(source, str) and source, f"{key} must be a path or a data URL, got {shown(source)}")
    where = _bytes_of(source, key) if source.startswith("data:") else _path_of(source, key, folder)
    try:
        for remark in check_picture(where):
            remarks[remark] = remarks.get(remark, 0) + 1
    except InputError as error:
        raise Unfit(f"{key}: {error}") from None
    return PictureFile(where, key)


def _path_of(source: str, key: str, folder: Path) -> str:
    require(not _ELSEWHERE.match(source), f"{key} must be a path or a data URL, got {shown(source)}; it is not fetched")
    return str(folder / source)


def _bytes_of(url: str, key: str) -> bytes:
    found = _DATA_URL.fullmatch(url)
    try:
        return base64.b64decode(found[1] if found else "?", validate=True)
    except (binascii.Error, ValueError):
        raise Unfit(f"{key} must be data:image/TYPE;base64, and base64 after it, got {shown(url[:60])}") from None


def _conversation(
    row: Mapping[str, Any], pictures: list[PictureFile], open_one: Any, tokenizer: Tokenizer
) -> PicturedText[PictureFile]:
    require(tokenizer.special_id(TURN_START), "messages need a model with a chat template; fine-tune it first (sft)")
    form = "messages" if "messages" in row else "conversations"
    turns, left = row[form], iter(pictures)
    require(isinstance(turns, list), f"{form} must be a list of turns, got {shown(turns)}")
    pieces = [_pieces(turn, f"{form}.{index}", open_one, bool(pictures)) for index, turn in enumerate(turns)]
    n_places = sum(piece is None for parts in pieces for piece in parts or ())
    first = next((parts for parts in pieces if parts is not None), None)
    if pictures and not n_places and first is not None:
        first[:0] = [None] * len(pictures)
        n_places = len(pictures)
    require(
        n_places == len(pictures),
        f"{form} have {n_places} places for pictures, and images has {len(pictures)}; there must be as many",
    )
    whole = [[next(left) if piece is None else piece for piece in parts] if parts else None for parts in pieces]
    checked = checked_conversation({form: [_text_alone(*pair) for pair in zip(turns, whole, strict=True)]})
    messages = [
        message if parts is None or all(isinstance(part, str) for part in parts) else {**message, "content": parts}
        for message, parts in zip(checked, whole, strict=True)
    ]
    return render_pictured(messages, tokenizer)


def _pieces(turn: Any, key: str, open_one: Any, has_images: bool) -> list[Any] | None:
    """Return the texts and pictures of a user's turn, None for a picture of the row's images; None for other turns."""
    if not isinstance(turn, dict):
        return None
    content, name = next(((turn[name], name) for name in ("content", "value") if name in turn), (None, ""))
    is_user = turn.get("role", turn.get("from")) in ("user", "human")
    if isinstance(content, list):
        found = list(_parts(content, f"{key}.{name}", open_one))
        require(is_user or all(isinstance(part, str) for part in found), f"{key}: only a user's turn may have pictures")
        return found if is_user else None
    if not is_user or not isinstance(content, str):
        return None
    return _split(content, [None] * content.count(MARKER)) if has_images else [content]


def _parts(content: list[Any], key: str, open_one: Any) -> Iterator[Any]:
    for index, part in enumerate(content):
        here = f"{key}.{index}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            given = part.get("image_url")
            yield open_one(given.get("url") if isinstance(given, dict) else given, f"{here}.image_url")
        elif kind == "image":
            source = next((part[name] for name in ("image", "url", "path") if part.get(name) is not None), None)
            yield None if source is None else open_one(source, f"{here}.image")
        else:
            yield checked_text([part], key)


def _text_alone(turn: Any, parts: Sequence[Any] | None) -> Any:
    """Return a turn without its pictures."""
    if parts is None:
        return turn
    text = "".join(part for part in parts if isinstance(part, str))
    return {**turn, ("content" if "content" in turn else "value"): text}
