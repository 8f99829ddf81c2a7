"""Rows of text with pictures: from jsonl files, or made offline.

A row of a file is ``{"images": [...], "prompt": "<image> ...", "text": ...}``; or a conversation whose user turns have
parts, ``{"type": "image", "image": ...}`` or OpenAI's ``image_url`` beside text. A picture is a path, relative to the
file, or a data URL. For a model with a chat template, prompt and text are a turn each; else the text follows the
prompt, and end-of-text follows it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError, shown
from moe_gpt.post_training.chat import TURN_END, TURN_START, Message, mark, render
from moe_gpt.post_training.conversations import Unfit, checked_conversation, checked_text, read_rows, require
from moe_gpt.vision.examples import Example
from moe_gpt.vision.pictured_text import MARKER, Picture, PicturedText, PictureFile, Row, plain, spell
from moe_gpt.vision.pictures import is_data_url, read_data_url

_READERS = 4
"""Pictures that are decoded at once, each in at most 0.5 GB."""
_ELSEWHERE = re.compile(r"[a-z]+://", re.IGNORECASE)


def read_pictured(paths: Sequence[Path], tokenizer: Tokenizer) -> list[Row]:
    """Return the rows of jsonl files. Their pictures are not opened.

    Raises:
        InputError: naming file and row of the first that cannot be used.
    """
    rows = list[Row]()
    for path in paths:
        for place, text in read_rows([path], functools.partial(_row, folder=path.parent, tokenizer=tokenizer)):
            named = [picture._replace(place=f"{place}: {picture.place}") for picture in text.pictures]
            rows.append(Row(text._replace(pictures=named), place))
    return rows


def check_pictures(rows: Sequence[Row]) -> tuple[list[Row], collections.Counter[str]]:
    """Read all pictures of rows to their end, several at a time.

    Returns:
        the rows, whose pictures have digests; what is not quite in the pixels, and of how many pictures.

    Raises:
        InputError: naming file, row and picture of the first that cannot be read.
    """
    pictures = [picture for row in rows for picture in row.text.pictures]
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        warnings.simplefilter("ignore")  # here, since threads that do so leave it to each other
        found = list(pool.map(PictureFile.checked, pictures))
    left = iter(picture for picture, _ in found)
    return [_with(row, left) for row in rows], collections.Counter(remark for _, told in found for remark in told)


def _with(row: Row, pictures: Iterator[PictureFile]) -> Row:
    """Return a row with the next pictures in the place of its own."""
    return row._replace(text=row.text._replace(pictures=[next(pictures) for _ in row.text.pictures]))


def row_of(example: Example, tokenizer: Tokenizer) -> Row:
    """Return the row of an example that is made offline."""
    left = iter(example.pictures)
    turns = [
        (_split(prompt, [next(left) for _ in range(prompt.count(MARKER))]), answer) for prompt, answer in example.turns
    ]
    return Row(_asked(turns, tokenizer), "")


def render_pictured(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> PicturedText[Any]:
    """Return the tokens of a conversation, as ``render`` does, with pictures.

    Args:
        messages: the content of a turn may be a list of texts and pictures; what is no text is a picture.
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


def _asked(turns: Sequence[tuple[list[str | Picture], str]], tokenizer: Tokenizer) -> PicturedText[Picture]:
    """Return prompts, each with its answer."""
    if tokenizer.special_id(TURN_START) is not None:
        roles = ("user", "assistant")
        messages: list[Message] = [
            {"role": role, "content": content} for turn in turns for role, content in zip(roles, turn, strict=True)
        ]
        return render_pictured(messages, tokenizer)
    text: PicturedText[Picture] = plain([])
    for pieces, answer in turns:
        ids = [*tokenizer.encode(answer), tokenizer.end_of_text_id]
        text = text.then(spell(pieces, tokenizer)).then(plain(ids, True))
    return text


class _Images:
    """The pictures of a row.

    Args:
        row: with ``images``, perhaps.
        folder: that of the file.
    """

    def __init__(self, row: Mapping[str, Any], folder: Path) -> None:
        self._folder = folder
        given = row.get("images", [])
        require(isinstance(given, list), f"images must be a list of paths or data URLs, got {shown(given)}")
        self.all = [self.open(image, f"images.{index}") for index, image in enumerate(given)]

    def open(self, source: Any, key: str) -> PictureFile:
        """Return a picture that is not opened yet."""
        require(isinstance(source, str) and source, f"{key} must be a path or a data URL, got {shown(source)}")
        try:
            return PictureFile(read_data_url(source) if is_data_url(source) else self._path_of(source, key), key)
        except InputError as error:
            raise Unfit(f"{key}: {error}") from None

    def _path_of(self, source: str, key: str) -> str:
        text = f"{key} must be a path or a data URL, got {shown(source)}; it is not fetched"
        require(not _ELSEWHERE.match(source), text)
        return str(self._folder / source)

    def require_places(self, n_places: int, what: str) -> None:
        """Raise ``Unfit`` unless there are as many places for the listed pictures as there are of them."""
        n = len(self.all)
        require(n_places == n, f"{what}, and images has {n}; there must be one for each picture")


def _row(row: dict[str, Any], folder: Path, tokenizer: Tokenizer) -> PicturedText[PictureFile]:
    require("image" not in row or "images" in row, "image is no key of a row; write images: [...], a list of pictures")
    is_one = "messages" not in row or not {"prompt", "text"} & row.keys()
    require(is_one, "it must have messages, or prompt and text, got both; keep one of them")
    images = _Images(row, folder)
    text = (_conversation if "messages" in row else _prompt_and_text)(row, images, tokenizer)
    require(text.pictures, "it has no picture, and of text alone nothing is learnt here; leave the row out")
    return text


def _prompt_and_text(row: Mapping[str, Any], images: _Images, tokenizer: Tokenizer) -> PicturedText[PictureFile]:
    missing = [key for key in ("prompt", "text") if key not in row]
    require(not missing, f"it must have images, prompt and text, or messages; missing: {' and '.join(missing)}")
    prompt, answer = (checked_text(row[key], key) for key in ("prompt", "text"))
    require(answer.strip(), "text must be an answer, got an empty text: no answer to learn from")
    if MARKER not in prompt:
        prompt = MARKER * len(images.all) + prompt
    n_markers = prompt.count(MARKER)
    images.require_places(n_markers, f"prompt has {n_markers} {MARKER}")
    return _asked([(_split(prompt, images.all), answer)], tokenizer)


def _conversation(row: Mapping[str, Any], images: _Images, tokenizer: Tokenizer) -> PicturedText[PictureFile]:
    require(tokenizer.special_id(TURN_START), "messages need a model with a chat template; fine-tune it first (sft)")
    turns = row["messages"]
    require(isinstance(turns, list), f"messages must be a list of turns, got {shown(turns)}")
    found = [_pieces(turn, f"messages.{index}", images) for index, turn in enumerate(turns)]
    n_places = sum(piece is None for parts in found for piece in parts)
    images.require_places(n_places, f"messages have {n_places} parts for listed pictures")
    left = iter(images.all)
    pieces = [[next(left) if piece is None else piece for piece in parts] for parts in found]
    checked = checked_conversation({"messages": [_text_alone(*pair) for pair in zip(turns, pieces, strict=True)]})
    messages: list[Message] = [
        {**message, "content": parts} if parts else message for message, parts in zip(checked, pieces, strict=True)
    ]
    return render_pictured(messages, tokenizer)


def _pieces(turn: Any, key: str, images: _Images) -> list[Any]:
    """Return the texts and pictures of a turn that has parts, None for a listed picture; nothing for other turns."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list):
        return []
    found = [_part(part, f"{key}.content.{index}", images) for index, part in enumerate(content)]
    are_texts = all(isinstance(part, str) for part in found)
    require(are_texts or turn.get("role") == "user", f"{key}: only a user's turn may have pictures")
    return [] if are_texts else found


def _part(part: Any, key: str, images: _Images) -> Any:
    """Return the text or the picture of a part of a turn; None for a listed picture."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image_url":
        given = part.get("image_url")
        return images.open(given.get("url") if isinstance(given, dict) else given, f"{key}.image_url")
    if kind == "image":
        source = next((part[name] for name in ("image", "url", "path") if part.get(name) is not None), None)
        return None if source is None else images.open(source, f"{key}.image")
    wanted = f'{key} must be {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}}, got {shown(part)}'
    require(kind == "text", wanted)
    return checked_text(part.get("text"), f"{key}.text")


def _text_alone(turn: Any, pieces: Sequence[Any]) -> Any:
    """Return a turn without its pictures."""
    if not pieces:
        return turn
    return {**turn, "content": "".join(piece for piece in pieces if isinstance(piece, str))}
