"""Tokenise once into flat memory-mapped files.

A source's store is one folder: ``train.bin`` and ``validation.bin`` (token ids, uint16 or uint32, every document
followed by end-of-text), where the documents end, and ``meta.json``. The folder appears complete or not at all
(``moe_gpt.durable``), and is compared with its digest before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_gpt.data.builtin_corpus import Document
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.durable import complete_folder, write_file
from moe_gpt.validation import InputError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
_DOCUMENTS_AT_ONCE = 128


class TokenStore:
    """The tokens of one split of one source, memory-mapped."""

    def __init__(self, folder: Path, split: str) -> None:
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.tokens = np.memmap(folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")
        self.document_ends = np.load(folder / f"{split}_ends.npy", mmap_mode="r")
        self.n_bytes: int = self.meta["n_bytes"][split]

    def __len__(self) -> int:
        """Return the number of tokens, end-of-text included."""
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """SHA-256 of the source's tokens, both splits."""
        return self.meta["digest"]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the document that holds the token at ``position``, and the token's offset in it."""
        document = int(np.searchsorted(self.document_ends, position, side="right"))
        return document, position - (int(self.document_ends[document - 1]) if document else 0)


def is_held_out(document: Document, validation_fraction: float) -> bool:
    """Whether a document belongs to the validation split: a hash of its key decides, so it never changes sides."""
    digest = hashlib.sha256(document.split_key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < validation_fraction * 2**64


class _SplitWriter:
    """Appends documents to one split's file."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, end_of_text_id: int) -> None:
        self.file: IO[bytes] = open(folder / f"{split}.bin", "wb+")  # noqa: SIM115 (closed by the caller's folder)
        self.dtype, self.end_of_text_id = dtype, end_of_text_id
        self.ends = array("q")  # 8 bytes for every document
        self.n_bytes = 0

    @property
    def n_tokens(self) -> int:
        return self.ends[-1] if self.ends else 0

    def write(self, ids: list[int], n_bytes: int) -> None:
        np.array([*ids, self.end_of_text_id], dtype=self.dtype).tofile(self.file)
        self.ends.append(self.n_tokens + len(ids) + 1)
        self.n_bytes += n_bytes


def build_store(
    name: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    max_tokens: int | None = None,
    report: Callable[[int, int], None] = lambda n_documents, n_tokens: None,
    rearrange: Callable[[str], list[int] | None] | None = None,
) -> None:
    """Tokenise a source's documents into ``folder``, which must not exist yet.

    Args:
        name: the source's name, for errors.
        documents: in the order in which they are stored.
        tokenizer: gives the ids and the end of each document.
        folder: appears complete or not at all.
        validation_fraction: share of documents held out by hash. Where that leaves a split without documents (a
            single book, say), the last such share of the tokens is held out instead.
        max_tokens: stop after this many tokens, both splits together.
        report: called with the number of documents and tokens so far.
        rearrange: returns other ids for a document, or None; training documents only.

    Raises:
        InputError: where there are no documents, or too few tokens for two splits.
    """
    with complete_folder(folder) as temporary:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        writers = {split: _SplitWriter(temporary, split, dtype, tokenizer.end_of_text_id) for split in SPLITS}
        try:
            _write_documents(documents, tokenizer, writers, validation_fraction, max_tokens, report, rearrange)
            _ensure_both_splits(name, writers, validation_fraction)
            _write_meta(temporary, writers, dtype)
        finally:
            for writer in writers.values():
                writer.file.close()


def _write_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    writers: dict[str, _SplitWriter],
    validation_fraction: float,
    max_tokens: int | None,
    report: Callable[[int, int], None],
    rearrange: Callable[[str], list[int] | None] | None,
) -> None:
    token_bytes = tokenizer.token_bytes()
    for group in _in_groups(documents, _DOCUMENTS_AT_ONCE):
        for document, ids in zip(group, tokenizer.encode_batch([d.text for d in group]), strict=True):
            split = "validation" if is_held_out(document, validation_fraction) else "train"
            if rearrange and split == "train":
                ids = rearrange(document.text) or ids
            n_tokens = sum(writer.n_tokens for writer in writers.values())
            if max_tokens is not None:
                if max_tokens - n_tokens < 2:  # a document has a token and its end
                    return
                ids = ids[: max_tokens - n_tokens - 1]
            writers[split].write(ids, int(token_bytes[ids].sum()))
        report(sum(len(w.ends) for w in writers.values()), sum(w.n_tokens for w in writers.values()))


def _in_groups(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _ensure_both_splits(name: str, writers: dict[str, _SplitWriter], validation_fraction: float) -> None:
    """Split by position where the split by document left one side empty."""
    total = sum(writer.n_tokens for writer in writers.values())
    if not total:
        raise InputError(f"source {name} has no documents with text; give it some, or remove the source")
    train, validation = writers["train"], writers["validation"]
    if train.ends and validation.ends:
        return
    full = train if train.ends else validation
    cut = total - max(1, int(total * validation_fraction))
    if cut < 2 or total - cut < 2:
        raise InputError(
            f"source {name} has {total} tokens, too few to hold out validation_fraction={validation_fraction}; "
            "give it more text, or raise data.validation_fraction"
        )
    full.file.seek(0)
    tokens = np.fromfile(full.file, dtype=full.dtype)
    n_bytes = full.n_bytes
    for writer, part, ends in (
        (train, tokens[:cut], [end for end in full.ends if end < cut] + [cut]),
        (validation, tokens[cut:], [end - cut for end in full.ends if end > cut]),
    ):
        writer.file.seek(0)
        writer.file.truncate()
        part.tofile(writer.file)
        writer.ends = array("q", ends)
        writer.n_bytes = round(n_bytes * len(part) / total)


def _write_meta(folder: Path, writers: dict[str, _SplitWriter], dtype: np.dtype) -> None:
    for split, writer in writers.items():
        ends = io.BytesIO()
        np.save(ends, np.array(writer.ends, dtype=np.int64))
        write_file(folder / f"{split}_ends.npy", [ends.getbuffer()])
        writer.file.flush()
        os.fsync(writer.file.fileno())
    meta = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        "n_tokens": {split: writer.n_tokens for split, writer in writers.items()},
        "n_documents": {split: len(writer.ends) for split, writer in writers.items()},
        "n_bytes": {split: writer.n_bytes for split, writer in writers.items()},
        "digest": _digest(folder),
    }
    write_file(folder / "meta.json", [json.dumps(meta, indent=2).encode()])


def _digest(folder: Path) -> str:
    """Return the SHA-256 of both splits' tokens."""
    digest = hashlib.sha256()
    for split in SPLITS:
        with open(folder / f"{split}.bin", "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        digest.update(split.encode())
    return digest.hexdigest()


def verify_store(folder: Path, read_all: bool) -> None:
    """Check that a store is what was written.

    Args:
        folder: of the store.
        read_all: compare the tokens with their digest; otherwise only the files' sizes.

    Raises:
        InputError: naming the file that is damaged, and what to do.
    """
    advice = "delete that folder to tokenise the source again"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {f"{split}.bin": meta["n_tokens"][split] * np.dtype(meta["dtype"]).itemsize for split in SPLITS}
        n_ends = {f"{split}_ends.npy": meta["n_documents"][split] for split in SPLITS}
        wanted = meta["digest"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{folder}: meta.json cannot be used ({error!r}); {advice}") from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise InputError(f"{folder}: {name} has {found:,} bytes, written were {size:,}; {advice}")
    for name, count in n_ends.items():
        try:
            ends = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{folder}: {name} cannot be used ({error}); {advice}") from None
        if len(ends) != count:
            raise InputError(f"{folder}: {name} has {len(ends)} documents, written were {count}; {advice}")
    if read_all and _digest(folder) != wanted:
        raise InputError(f"{folder}: the tokens are not those that were written: their SHA-256 differs; {advice}")
