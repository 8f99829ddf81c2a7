"""Byte-level BPE: trained once, loaded always.

The pre-tokenizer is exactly GPT-2's byte level (no normaliser, no prefix space, the whole byte alphabet). Therefore
every text survives encoding and decoding, and other runtimes recognise the tokenizer. ``encode`` adds no tokens, and
text that spells a special token stays text.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_gpt.errors import InputError

END_OF_TEXT = "<|endoftext|>"
_PIECE_CHARS = 1 << 16
_CHARS_AT_ONCE = 1 << 19


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with its end-of-text token."""

    def __init__(self, backend: tokenizers.Tokenizer, end_of_text: str = END_OF_TEXT) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not an end
        self._backend.no_padding()
        self._backend.no_truncation()
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None  # for training with other merges; the same text must give the same ids
        end_of_text_id = backend.token_to_id(end_of_text)
        if end_of_text_id is None:
            special = ", ".join(self.special_tokens()) or "none"
            raise InputError(
                f"data.tokenizer.end_of_text must be a token of the tokenizer, got {end_of_text!r}; its special "
                f"tokens are {special}"
            )
        self.end_of_text, self.end_of_text_id = end_of_text, end_of_text_id
        self._piece_chars = _PIECE_CHARS if self._may_be_cut_at_words() else None
        self._refuse_gaps()
        self._refuse_special_tokens_that_text_gives()

    def _refuse_gaps(self) -> None:
        """Raise an error where most ids up to the highest have no token: tables need memory for each."""
        n_tokens, highest = self._backend.get_vocab_size(with_added_tokens=True), self.vocab_size - 1
        if highest > 2 * n_tokens + 1000:
            raise InputError(f"the tokenizer must number its {n_tokens} tokens without large gaps, got id {highest}")

    def _refuse_special_tokens_that_text_gives(self) -> None:
        """Raise an error where a text that spells a special token would become that token, not text."""
        unknown = {*self.encode("\U0010fffe"), *self.encode(" \U0010fffe")}  # what unknown characters become
        given = {self.end_of_text: self.end_of_text_id}
        for token, index in {**self.special_tokens(), **given}.items():
            if (index not in unknown or token in given) and index in {
                *self.encode(token),
                *self.encode(f"a {token} a"),
            }:
                raise InputError(
                    f"the tokenizer makes the special token {token!r} of text that only spells it, so a document could "
                    "end in its middle; train the tokenizer without it among the special_tokens of its trainer, then "
                    "add it with add_special_tokens; or use another tokenizer"
                )

    def __reduce__(self) -> tuple:  # the library's pickle loses encode_special_tokens
        return Tokenizer._from_json, (self.to_json(), self.end_of_text)

    @classmethod
    def _from_json(cls, text: str, end_of_text: str) -> Tokenizer:
        return cls(tokenizers.Tokenizer.from_str(text), end_of_text)

    @classmethod
    def load(cls, path: str | Path, end_of_text: str = END_OF_TEXT) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            FileNotFoundError: if there is no such file.
            InputError: if the file is not a tokenizer or has no ``end_of_text`` token.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}; data.tokenizer.file must be the path of a tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_buffer(_with_small_ids(path)), end_of_text)
        except (InputError, OSError):
            raise
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path} is not a tokenizer.json: {error}") from None

    @classmethod
    def from_hub(cls, name: str, revision: str | None = None, end_of_text: str = END_OF_TEXT) -> Tokenizer:
        """Fetch the ``tokenizer.json`` of a repository on the Hugging Face hub, or find it in the hub's cache."""
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(name, "tokenizer.json", revision=revision)
        except Exception as error:  # the hub and its libraries raise many types
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InputError(
                f"data.tokenizer.hub={name!r} could not be fetched: {reason}; without a network, set "
                "data.tokenizer.file to a tokenizer.json on disk"
            ) from error
        return cls.load(path, end_of_text)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included. Every id is smaller."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without added tokens."""
        return self.encode_batch([text])[0]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are spelled out, as in a chat template."""
        reader = tokenizers.Tokenizer.from_str(self._backend.to_str())
        reader.encode_special_tokens = False
        return reader.encode(_checked(text), add_special_tokens=False).ids

    def spelled_special_tokens(self, text: str) -> list[str]:
        """Return the special tokens that the text spells, which ``encode`` reads as text."""
        return [token for token in self.special_tokens() if token in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts in parallel, as ``encode_arrays`` does."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts in parallel, as arrays of uint32.

        A long text is encoded in pieces if that gives the same ids. This saves memory, because the library needs some
        400 bytes for each token that it encodes at once.

        Raises:
            InputError: if a text holds half of a surrogate pair, which UTF-8 cannot represent.
        """
        pieces = [list(_cut_at_words(_checked(text), self._piece_chars)) for text in texts]
        ids = (
            np.array(encoding.ids, dtype=np.uint32)
            for group in in_groups(itertools.chain.from_iterable(pieces), len, _CHARS_AT_ONCE)
            for encoding in self._backend.encode_batch_fast(group, add_special_tokens=False)
        )
        return [np.concatenate(list(itertools.islice(ids, len(parts)))) for parts in pieces]

    def _may_be_cut_at_words(self) -> bool:
        """Whether a text may be encoded in pieces that begin where a word begins. GPT-2's byte level allows it.

        No merge joins two words.
        """
        spec = json.loads(self._backend.to_str())
        splits = spec["pre_tokenizer"] or {}
        is_byte_level = splits.get("type") == "ByteLevel" and bool(splits.get("use_regex", True))
        found_unsplit = [token for token in spec["added_tokens"] if not token["special"]]
        return is_byte_level and not (splits["add_prefix_space"] or spec["normalizer"] or found_unsplit)

    def first_loss(self, text: str) -> tuple[str, str] | None:
        """Return the first part of a text that decoding does not give back, and what it gives instead; None if none.

        Text is lost by a tokenizer that lacks tokens for some bytes, or that normalises, to lower case for example. A
        space that decoding puts before the text loses nothing.
        """
        back = self.decode(self.encode(text))
        if back in (text, f" {text}"):
            return None
        at = len(os.path.commonprefix([text, back]))
        return text[at : at + 10], back[at : at + 10]

    def template(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer's template puts before and after a text, such as Llama's <s>.

        ``encode`` never adds them. Tokenizers trained here have no template.
        """
        plain, whole = (self._backend.encode("a", add_special_tokens=add).ids for add in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[:start], whole[start + len(plain) :]

    def special_tokens(self) -> dict[str, int]:
        """Return the id of each special token."""
        decoder = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in decoder.items() if token.special}

    def special_id(self, token: str) -> int | None:
        """Return the id of a special token; None if there is no such token."""
        return self.special_tokens().get(token)

    def spell(self, index: int) -> str:
        """Return a token as the vocabulary spells it; empty if there is no such id."""
        return self._backend.id_to_token(index) or ""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; special tokens are spelled out."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int], context: Sequence[int] = ()) -> Iterator[str]:
        """Yield text as ids arrive, holding back bytes until they form whole characters.

        Incomplete bytes at the end become replacement characters.

        Args:
            context: ids before them that are already shown; some decoders drop the space of the first token.
        """
        text = TextDecoder(self, context)
        for token in ids:
            if piece := text.push(token):
                yield piece
        if piece := text.finish():
            yield piece

    def token_bytes(self) -> np.ndarray:
        """Return the bytes of text of each id, (V,) int64; special tokens have none.

        The numbers are exact for byte-level tokenizers, which spell each byte as one letter. For others they are the
        token's length in UTF-8, with SentencePiece's word mark as a space and its <0xNN> as one byte.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            spelled = re.sub(r"^<0x[0-9A-F]{2}>$", " ", token.replace("\u2581", " "))
            lengths[index] = len(token) if is_byte_level else len(spelled.encode())
        lengths[list(self.special_tokens().values())] = 0
        return lengths

    def with_special_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Return a tokenizer that has these special tokens too; new ones get the ids after the last one.

        Raises:
            InputError: where the library numbers them otherwise, because the ids have gaps.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
        grown = Tokenizer(backend, self.end_of_text)
        missing = [token for token in tokens if self.special_id(token) is None]
        ids = [index for token in missing if (index := grown.special_tokens()[token]) >= self.vocab_size]
        if ids != list(range(self.vocab_size, self.vocab_size + len(ids))):
            raise InputError(f"the tokenizer must have ids without gaps to get {', '.join(missing)}, got the ids {ids}")
        return grown

    def without_added_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Return a tokenizer without those of the tokens that were added to its vocabulary."""
        values = json.loads(self.to_json())
        words = values["model"].get("vocab", ())
        kept = [each for each in values["added_tokens"] if each["content"] not in tokens or each["content"] in words]
        text = json.dumps(values | {"added_tokens": kept})
        return Tokenizer(tokenizers.Tokenizer.from_str(text), self.end_of_text)

    def to_json(self) -> str:
        """Return the contents of a ``tokenizer.json``."""
        return self._backend.to_str(pretty=True)


class TextDecoder:
    """Turns ids that arrive one by one into text; ``Tokenizer.decode_stream`` explains what it holds back."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._context, self._pending = tokenizer, list(context), list[int]()

    def push(self, token: int) -> str:
        """Return the text that a token completes; nothing while a character is incomplete."""
        self._pending.append(token)
        text = self._text_of_pending()
        if text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Return what was held back; incomplete bytes become replacement characters."""
        return self._text_of_pending() if self._pending else ""

    def _text_of_pending(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


def _with_small_ids(path: str | Path) -> bytes:
    """Return the contents of a tokenizer.json after refusing ids up to which the library would count."""
    data = Path(path).read_bytes()
    if huge := re.search(rb'(?<!\\)":\s*(\d{8,})', data):
        raise InputError(f"{path} must have ids below 10,000,000, got {huge[1][:20].decode()}")
    return data


_Item = TypeVar("_Item")


def in_groups(items: Iterable[_Item], size: Callable[[_Item], int], limit: int) -> Iterator[list[_Item]]:
    """Yield the items in lists; each ends with the item that brings the sum of sizes to ``limit``."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


_WORD_START = re.compile(r"(?<=\S)[ \n]|(?<=[A-Za-z])[0-9]|(?<=[A-Za-z\u4e00-\u9fa5])[\u3001\u3002\uff0c]")
"""A space after another character, a digit after a letter, or a Chinese comma or full stop after a letter."""


def _cut_at_words(text: str, piece_chars: int | None) -> Iterator[str]:
    """Yield pieces of at least ``piece_chars``, cut where GPT-2's byte level starts a word; None yields the whole."""
    start = 0
    while piece_chars and (word := _WORD_START.search(text, start + piece_chars)):
        yield text[start : word.start()]
        start = word.start()
    yield text[start:]


_LONG_WORD = re.compile(r"(?<!\S)\S{513,}|(?<!\s)\s{513,}")


def _cut_long_words(text: str) -> Iterator[str]:
    """Yield pieces in which no word has more than 1,024 characters; a trainer needs time in its square."""
    start = 0
    for word in _LONG_WORD.finditer(text):
        for cut in range(word.start() + 512, word.end(), 512):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"text must be valid Unicode, got a lone surrogate in {ascii(text[:40])}") from None
    return text


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, end_of_text: str = END_OF_TEXT, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train byte-level BPE (arXiv 1508.07909; GPT-2's byte alphabet).

    The special tokens have the first ids: end-of-text 0, then the others in order. ``vocab_size`` includes them. Too
    little text for that many merges gives a smaller vocabulary.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # the library needs memory for each word of a text at once, so long texts come in pieces
    pieces = (piece for text in texts for part in _cut_at_words(text, _PIECE_CHARS) for piece in _cut_long_words(part))
    backend.train_from_iterator(pieces, trainer)
    try:
        return Tokenizer(backend, end_of_text)
    except InputError as error:
        raise InputError(
            f"data.tokenizer.end_of_text and special_tokens must not occur as words in the text, such as <|name|> does "
            f"not: {error}"
        ) from None
