"""Tokens in flat memory-mapped files, written once.

A source's store is one folder with ``train.bin`` and ``validation.bin`` (token ids, uint16 or uint32, end-of-text after
every document), the ends of the documents, the SHA-256 of each MiB of tokens, and ``meta.json``. The folder appears
complete or not at all (``moe_gpt.files.durable``). Each MiB is compared with its digest when it is first read.
Therefore even a large store opens at once, and no damaged token is ever used.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_gpt.data.encode import EncodedDocument
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.durable import complete_folder, read_digest, write_file

FORMAT_VERSION = 3
SPLITS = ("train", "validation")


_BLOCK_BYTES = 1 << 20
_ADVICE = "delete that folder to tokenise the source again"


class CheckedTokens:
    """Token ids in a memory-mapped file, read by slice or by an array of positions.

    Args:
        digests: SHA-256 of each block of ``_BLOCK_BYTES``, compared when the block is first read; None skips this.
    """

    def __init__(self, path: Path, dtype: str, digests: bytes | None = None) -> None:
        self._path, self._digests = path, digests or b""
        is_empty = path.stat().st_size == 0  # nothing is held out
        self._ids = np.empty(0, dtype) if is_empty else np.memmap(path, dtype=dtype, mode="r")
        self._block_tokens = _BLOCK_BYTES // self._ids.itemsize
        self._unchecked = np.ones(len(self._digests) // 32, dtype=bool)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        """Return the ids at the places; raise ``InputError`` if they have changed since they were written."""
        if self._unchecked.any():
            self._check(places)
        return self._ids[places]

    def _check(self, places: slice | np.ndarray) -> None:
        if isinstance(places, slice):
            first, last, _ = places.indices(len(self))
            blocks = np.arange(first // self._block_tokens, -(-last // self._block_tokens) if last > first else 0)
        else:
            blocks = np.unique(places // self._block_tokens)
        for block in blocks[self._unchecked[blocks]].tolist():
            start = block * self._block_tokens
            ids = self._ids[start : start + self._block_tokens]
            if hashlib.sha256(ids.data).digest() != self._digests[32 * block : 32 * block + 32]:
                raise InputError(
                    f"{self._path}: tokens from {start:,} to {start + len(ids):,} have changed since they were "
                    f"written, because their SHA-256 differs; {_ADVICE}"
                )
            self._unchecked[block] = False


class TokenStore:
    """The tokens of one split of one source, memory-mapped.

    Args:
        split: train or validation.
        check: compare tokens with their digests when they are first read.
    """

    def __init__(self, folder: Path, split: str, check: bool = True) -> None:
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self._folder, self._split, self._ends_checked = folder, split, not check
        digests = (folder / f"{split}.sha256").read_bytes() if check else None
        self.tokens = CheckedTokens(folder / f"{split}.bin", self.meta["dtype"], digests)
        self.document_ends = np.load(folder / f"{split}_ends.npy", mmap_mode="r")
        self.n_bytes: int = self.meta["n_bytes"][split]
        """Bytes of the text, in UTF-8."""
        self.bytes_per_token_byte = self.n_bytes / max(1, self.meta["n_token_bytes"][split])
        """Above 1 where the tokenizer loses text; measures per byte are per byte of the text."""

    def __len__(self) -> int:
        """Return the number of tokens, end-of-text included."""
        return len(self.tokens)

    @property
    def lost(self) -> str | None:
        """What the tokenizer loses of the text; None where nothing was found."""
        return self.meta["lost"]

    @property
    def digest(self) -> str:
        """SHA-256 of the source's tokens in both splits."""
        return self.meta["digest"]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the document that holds the token at ``position``, and the token's offset in it."""
        if not self._ends_checked:
            path = self._folder / f"{self._split}_ends.npy"
            if read_digest(path).sha256 != self.meta["digest_of_ends"][self._split]:
                raise InputError(f"{path} has changed since it was written, because its SHA-256 differs; {_ADVICE}")
            self._ends_checked = True
        document = int(np.searchsorted(self.document_ends, position, side="right"))
        return document, position - (int(self.document_ends[document - 1]) if document else 0)


class SplitWriter:
    """Appends documents to one split's file."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, end_of_text_id: int) -> None:
        self.file: IO[bytes] = open(folder / f"{split}.bin", "wb+")  # noqa: SIM115 (closed by the caller's folder)
        self.dtype, self.end_of_text_id = dtype, end_of_text_id
        self.ends = array("q")  # 8 bytes for every document
        self.n_bytes = 0  # of the documents' texts
        self.n_token_bytes = 0  # of what the tokens spell

    @property
    def n_tokens(self) -> int:
        """Tokens so far, end-of-text included."""
        return self.ends[-1] if self.ends else 0

    @property
    def n_documents(self) -> int:
        """Documents so far."""
        return len(self.ends)

    def write(self, ids: np.ndarray, n_bytes: int, n_token_bytes: int) -> None:
        """Append a document, and end-of-text."""
        np.append(ids, self.end_of_text_id).astype(self.dtype).tofile(self.file)
        self.ends.append(self.n_tokens + len(ids) + 1)
        self.n_bytes += n_bytes
        self.n_token_bytes += n_token_bytes

    def extend(self, tokens: np.ndarray, ends: np.ndarray, n_bytes: int, n_token_bytes: int) -> None:
        """Append documents that another writer has written: its tokens, the documents' ends, and the bytes of all."""
        tokens.tofile(self.file)
        self.ends.frombytes((ends + self.n_tokens).astype(np.int64).tobytes())
        self.n_bytes += n_bytes
        self.n_token_bytes += n_token_bytes

    def replace(self, tokens: np.ndarray, ends: list[int], share: float, whole: tuple[int, int]) -> None:
        """Put other tokens and ends in the place of what was written, with this share of all bytes."""
        self.file.seek(0)
        self.file.truncate()
        tokens.tofile(self.file)
        self.ends = array("q", ends)
        self.n_bytes, self.n_token_bytes = (round(n_bytes * share) for n_bytes in whole)

    def finish(self, ends_file: Path) -> str:
        """Force the tokens to the disk, write the documents' ends, and return the SHA-256 of the ends."""
        ends = io.BytesIO()
        np.save(ends, np.array(self.ends, dtype=np.int64))
        self.file.flush()
        os.fsync(self.file.fileno())
        return write_file(ends_file, [ends.getbuffer()]).sha256


Writers = dict[str, SplitWriter]
"""The writer of each split."""


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of token ids in files: two bytes if that is enough."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def open_writers(folder: Path, tokenizer: Tokenizer) -> Writers:
    """Return writers for both splits of a folder; the caller closes their files."""
    return {split: SplitWriter(folder, split, dtype_of(tokenizer), tokenizer.end_of_text_id) for split in SPLITS}


def build_store(
    name: str,
    encoded: Iterable[list[EncodedDocument]],
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    max_tokens: int | None = None,
    report: Callable[[int, int], None] = lambda n_documents, n_tokens: None,
    lost: str | None = None,
) -> None:
    """Write a source's tokens into ``folder``, which must not exist yet.

    Args:
        name: the source's name, for errors.
        encoded: groups of documents, in the order in which they are stored.
        folder: appears complete or not at all.
        validation_fraction: if one split has no document (a single book, for example), the last tokens of the source
            are held out instead: this share of them. 0 holds out nothing.
        max_tokens: stop after this many tokens in both splits together.
        report: called with the number of documents and tokens so far.
        lost: what the tokenizer loses of the text, for those who use the store.
    """

    def write(writers: Writers) -> None:
        write_documents(encoded, tokenizer.token_bytes(), writers, max_tokens, report)

    write_store(name, write, tokenizer, folder, validation_fraction, lost)


def write_store(
    name: str,
    write: Callable[[Writers], None],
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    lost: str | None,
) -> None:
    """Do as ``build_store`` does, with a function that writes the documents."""
    with complete_folder(folder) as temporary:
        writers, dtype = open_writers(temporary, tokenizer), dtype_of(tokenizer)
        try:
            write(writers)
            _ensure_both_splits(name, writers, validation_fraction)
            _write_meta(temporary, writers, dtype, lost)
        finally:
            for writer in writers.values():
                writer.file.close()


def write_documents(
    encoded: Iterable[list[EncodedDocument]],
    token_bytes: np.ndarray,
    writers: Writers,
    max_tokens: int | None,
    report: Callable[[int, int], None] = lambda n_documents, n_tokens: None,
) -> None:
    """Write documents until both splits together have ``max_tokens`` tokens; the last document may be cut."""
    limit = math.inf if max_tokens is None else max_tokens
    for group in encoded:
        for ids, is_held_out, n_bytes in group:
            room = limit - total_of(writers, "n_tokens")
            if room < 2:  # a document needs a token and end-of-text
                return
            kept = ids[: int(min(len(ids), room - 1))]
            n_token_bytes = int(token_bytes[kept].sum())
            n_bytes = n_bytes if len(kept) == len(ids) else min(n_bytes, n_token_bytes)
            writers["validation" if is_held_out else "train"].write(kept, n_bytes, n_token_bytes)
        report(total_of(writers, "n_documents"), total_of(writers, "n_tokens"))


def total_of(writers: Writers, count: str) -> int:
    """Return the sum of a writer's count, such as n_tokens, over both splits."""
    return sum(getattr(writer, count) for writer in writers.values())


def _ensure_both_splits(name: str, writers: Writers, validation_fraction: float) -> None:
    """Split by position if the split by document left one side empty."""
    total = total_of(writers, "n_tokens")
    if not total:
        raise InputError(f"source {name} has no documents with text; add text, or remove the source")
    if not validation_fraction or all(writer.ends for writer in writers.values()):
        return
    cut = total - max(1, int(total * validation_fraction))
    if min(cut, total - cut) < 2:
        raise InputError(
            f"source {name} has {total} tokens, too few to hold out validation_fraction={validation_fraction}; "
            "add text, or raise data.validation_fraction"
        )
    _split_at(cut, writers["train" if writers["train"].ends else "validation"], writers)


def _split_at(cut: int, full: SplitWriter, writers: Writers) -> None:
    """Move the tokens from ``cut`` on to the validation split, and those before it to the training split."""
    total = full.n_tokens
    full.file.seek(0)
    tokens, ends = np.fromfile(full.file, dtype=full.dtype), np.array(full.ends)
    share, whole, rest = cut / total, (full.n_bytes, full.n_token_bytes), (ends[ends > cut] - cut).tolist()
    writers["train"].replace(tokens[:cut], [*ends[ends < cut].tolist(), cut], share, whole)
    writers["validation"].replace(tokens[cut:], rest, 1 - share, whole)


def _write_meta(folder: Path, writers: Writers, dtype: np.dtype, lost: str | None) -> None:
    digest_of_ends = {split: writer.finish(folder / f"{split}_ends.npy") for split, writer in writers.items()}
    meta = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        **{
            key: {split: getattr(writer, key) for split, writer in writers.items()}
            for key in ("n_tokens", "n_documents", "n_bytes", "n_token_bytes")
        },
        **_digests(folder),
        "digest_of_ends": digest_of_ends,
        "lost": lost,
    }
    write_file(folder / "meta.json", [json.dumps(meta, indent=2).encode()])


def _digests(folder: Path) -> dict[str, Any]:
    """Write the SHA-256 of each block; return the digest of all tokens and those of the files with block digests."""
    whole, of_blocks = hashlib.sha256(), {}
    for split in SPLITS:
        blocks = bytearray()
        with open(folder / f"{split}.bin", "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                whole.update(block)
                blocks += hashlib.sha256(block).digest()
        whole.update(split.encode())
        of_blocks[split] = write_file(folder / f"{split}.sha256", [bytes(blocks)]).sha256
    return {"digest": whole.hexdigest(), "digest_of_blocks": of_blocks}


def block_digests(data: bytes) -> bytes:
    """Return the SHA-256 of each block of a file's contents, for ``CheckedTokens``."""
    starts = range(0, len(data), _BLOCK_BYTES)
    return b"".join(hashlib.sha256(data[start : start + _BLOCK_BYTES]).digest() for start in starts)


def verify_store(folder: Path) -> None:
    """Raise ``InputError`` if a store's files are damaged. Its tokens are checked when they are read."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        itemsize = np.dtype(meta["dtype"]).itemsize
        checks = [
            (folder / f"{split}{ending}", found, what, wanted[split] * size)
            for ending, found, what, wanted, size in (
                (".bin", lambda path: path.stat().st_size, "{:,} bytes", meta["n_tokens"], itemsize),
                ("_ends.npy", lambda path: len(np.load(path, mmap_mode="r")), "{:,} documents", meta["n_documents"], 1),
                (".sha256", lambda path: read_digest(path).sha256, "SHA-256 {}", meta["digest_of_blocks"], 1),
            )
            for split in SPLITS
        ]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{folder}: meta.json cannot be used ({error!r}); {_ADVICE}") from None
    for check in checks:
        _verify(*check)


def _verify(file: Path, find: Callable[[Path], int | str], what: str, wanted: int | str) -> None:
    try:
        found = find(file)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file.parent}: {file.name} cannot be used ({error}); {_ADVICE}") from None
    if found != wanted:
        text = f"{file.name} has {what.format(found)}, but was written with {what.format(wanted)}"
        raise InputError(f"{file.parent}: {text}; {_ADVICE}")
