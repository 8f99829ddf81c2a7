"""The tokens of one task, and merging the tokens of all tasks into a store.

A part is a folder with a file of tokens for each split, as in a store, and a table with a row for each document, in the
order in which the documents were read.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_gpt.data.encode import EncodedDocument
from moe_gpt.data.token_store import SPLITS, Writers, open_writers, total_of, write_documents
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.durable import complete_folder, write_file

_ROW = np.dtype([("is_held_out", "?"), ("n_bytes", "<i8"), ("n_token_bytes", "<i8"), ("digest", "V16")])


def write_part(
    folder: Path, documents: Iterator[tuple[EncodedDocument, bytes]], tokenizer: Tokenizer, seconds: Callable[[], float]
) -> None:
    """Write a part, which appears complete or not at all.

    Args:
        folder: a part that is there is replaced.
        documents: each with 16 bytes that are the same for the same text.
        seconds: called at the end for the time that the part took.
    """
    token_bytes = tokenizer.token_bytes()
    flags, n_bytes, n_token_bytes, digests = bytearray(), array("q"), array("q"), bytearray()
    with complete_folder(folder, replace=True) as temporary:
        writers = open_writers(temporary, tokenizer)
        try:
            for document, digest in documents:
                spelled = int(token_bytes[document.ids].sum())
                writers[SPLITS[document.is_held_out]].write(document.ids, document.n_bytes, spelled)
                flags.append(document.is_held_out)
                n_bytes.append(document.n_bytes)
                n_token_bytes.append(spelled)
                digests += digest
            for split, writer in writers.items():
                writer.finish(temporary / f"{split}_ends.npy")
        finally:
            for writer in writers.values():
                writer.file.close()
        table = np.empty(len(flags), _ROW)
        table["is_held_out"], table["digest"] = np.frombuffer(flags, "?"), np.frombuffer(digests, "V16")
        table["n_bytes"], table["n_token_bytes"] = n_bytes, n_token_bytes
        buffer = io.BytesIO()
        np.save(buffer, table)
        write_file(temporary / "documents.npy", [buffer.getbuffer()])
        write_file(temporary / "part.json", [json.dumps({"seconds": seconds()}).encode()])


class Part:
    """The documents of a task that was written by ``write_part``, memory-mapped.

    Raises:
        InputError: if its files do not fit each other.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder = folder
        self.table = np.load(folder / "documents.npy", mmap_mode="r")
        self.ends = {split: np.load(folder / f"{split}_ends.npy") for split in SPLITS}
        self.tokens = {split: _map(folder / f"{split}.bin", dtype) for split in SPLITS}
        self.seconds: float = json.loads((folder / "part.json").read_text(encoding="utf-8"))["seconds"]
        for split, ends in self.ends.items():
            wanted = int(ends[-1]) if len(ends) else 0
            if len(self.tokens[split]) != wanted:
                found = f"{len(self.tokens[split]):,} tokens, but was written with {wanted:,}"
                raise InputError(f"{folder / split}.bin has {found}; delete {folder.parents[1]} to prepare it again")

    @property
    def n_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(map(len, self.tokens.values()))

    def copy_all(self, writers: Writers) -> None:
        """Append all documents to a store, file by file."""
        for is_held_out, split in enumerate(SPLITS):
            rows = self.table[self.table["is_held_out"] == bool(is_held_out)]
            sums = (int(rows[column].sum()) for column in ("n_bytes", "n_token_bytes"))
            writers[split].extend(self.tokens[split], self.ends[split], *sums)

    def documents(self, keep: np.ndarray) -> Iterator[list[EncodedDocument]]:
        """Yield the documents for which ``keep`` is true, one by one."""
        places = {split: iter(zip([0, *ends], ends, strict=False)) for split, ends in self.ends.items()}
        rows = zip(self.table["is_held_out"].tolist(), self.table["n_bytes"].tolist(), keep.tolist(), strict=True)
        for is_held_out, n_bytes, is_kept in rows:
            split = SPLITS[is_held_out]
            start, end = next(places[split])
            if is_kept:
                yield [EncodedDocument(self.tokens[split][start : end - 1], is_held_out, n_bytes)]


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


@dataclasses.dataclass
class Merged:
    """What a merge found: documents in all parts, exact repeats, documents beyond a limit, and the tasks' seconds."""

    n_documents: int = 0
    n_repeats: int = 0
    n_beyond: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Merge:
    """Puts parts in order into a store, exactly as if one process had tokenised their documents.

    Args:
        deduplicate: keep the first document of each text only.
        max_documents: documents to keep; the rest is left out.
        max_tokens: tokens to keep in both splits together; the last document may be cut.
    """

    folders: list[Path]
    tokenizer: Tokenizer
    deduplicate: bool
    max_documents: int | None
    max_tokens: int | None

    def __call__(self, writers: Writers, report: Callable[[int, int], None]) -> Merged:
        """Append the documents to a store's files; ``report`` is called with documents and tokens so far."""
        found, seen = Merged(), set[bytes]()
        token_bytes = self.tokenizer.token_bytes()
        limit = math.inf if self.max_tokens is None else self.max_tokens
        for folder in self.folders:
            part = Part(folder, writers["train"].dtype)
            n_before = total_of(writers, "n_documents")
            fresh = self._fresh(part.table, seen)
            keep = fresh & (np.cumsum(fresh) <= self._room(n_before))
            if keep.all() and total_of(writers, "n_tokens") + part.n_tokens < limit:
                part.copy_all(writers)
            else:
                write_documents(part.documents(keep), token_bytes, writers, self.max_tokens)
            n_stored = total_of(writers, "n_documents") - n_before
            found.n_documents += len(fresh)
            found.n_repeats += len(fresh) - int(fresh.sum())
            found.n_beyond += int(fresh.sum()) - n_stored
            found.seconds += part.seconds
            report(n_before + n_stored, total_of(writers, "n_tokens"))
        return found

    def _room(self, n_documents: int) -> float:
        return math.inf if self.max_documents is None else self.max_documents - n_documents

    def _fresh(self, table: np.ndarray, seen: set[bytes]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return for each document whether its text is new; note the texts."""
        if not self.deduplicate:
            return np.ones(len(table), dtype=bool)
        fresh = np.zeros(len(table), dtype=bool)
        for index, digest in enumerate(map(bytes, table["digest"])):
            fresh[index] = digest not in seen
            seen.add(digest)
        return fresh
