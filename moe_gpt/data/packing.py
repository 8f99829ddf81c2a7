"""Conversations packed into rows, once; and the rows as a stream in closed form.

A row has ``row_tokens`` tokens: whole conversations, each followed by padding of at least one token, which ends its
document, so that attention does not cross from one to the next. End-of-text would not do, because in some tokenizers
it is the end of a turn. Packing is best fit decreasing (Johnson 1973). A folder of the cache has the tokens and a byte
for each that says whether the assistant produces it. It appears complete or not at all.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_gpt.data.stream import Batch, Location, check_batch, in_passes
from moe_gpt.data.token_store import CheckedTokens, block_digests
from moe_gpt.errors import InputError
from moe_gpt.files.durable import complete_folder, write_file
from moe_gpt.ops import IGNORED_TARGET

FORMAT_VERSION = 1
"""Changes with the packing and with the rendering, so that rows of another kind are never read."""
_FILES = ("ids", "is_answer")


class Rendered(NamedTuple):
    """The tokens of a conversation."""

    ids: list[int]
    is_answer: list[bool]
    """Whether the assistant produces this token."""


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Return the indices of what each row holds, by best fit decreasing: the longest first, each where it fits best."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room and number of each row, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[index], 0))
        room, row = free.pop(place) if place < len(free) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(free, (room - lengths[index], row))
    return rows


def write_rows(
    folder: Path, conversations: Sequence[Rendered], pad_id: int, dtype: np.dtype, row_tokens: int, notes: Sequence[str]
) -> None:
    """Pack conversations into rows and write them.

    Args:
        folder: must not exist yet.
        conversations: none longer than a row with the padding after it.
        pad_id: the token of padding.
        dtype: of token ids.
        notes: what people should know of them at the start of a run.
    """
    rows = pack([len(conversation.ids) + 1 for conversation in conversations], row_tokens)
    ids = np.full((len(rows), row_tokens), pad_id, dtype)
    is_answer = np.zeros((len(rows), row_tokens), np.uint8)
    for row, members in enumerate(rows):
        start = 0
        for conversation in (conversations[index] for index in members):
            end = start + len(conversation.ids)
            ids[row, start:end] = conversation.ids
            is_answer[row, start:end] = conversation.is_answer
            start = end + 1
    meta = {"n_conversations": len(conversations), "n_rows": len(rows), "row_tokens": row_tokens, "notes": list(notes)}
    meta |= {"n_tokens": sum(len(c.ids) for c in conversations), "n_answer": int(is_answer.sum())}
    with complete_folder(folder) as temporary:
        for name, array in zip(_FILES, (ids, is_answer), strict=True):
            write_file(temporary / f"{name}.bin", [array.tobytes()])
            write_file(temporary / f"{name}.sha256", [block_digests(array.tobytes())])
        meta |= {"dtype": ids.dtype.name, "digest": hashlib.sha256(ids.tobytes() + is_answer.tobytes()).hexdigest()}
        write_file(temporary / "meta.json", [json.dumps(meta, indent=2).encode()])


class Rows:
    """Packed rows in a folder; each MiB is compared with its digest when it is first read."""

    def __init__(self, folder: Path) -> None:
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.n_rows, self.row_tokens = self.meta["n_rows"], self.meta["row_tokens"]
            types = (self.meta["dtype"], "uint8")
            self.ids, self.is_answer = (
                CheckedTokens(folder / f"{name}.bin", dtype, (folder / f"{name}.sha256").read_bytes())
                for name, dtype in zip(_FILES, types, strict=True)
            )
            if not len(self.ids) == len(self.is_answer) == self.n_rows * self.row_tokens:
                raise ValueError(f"it must have {self.n_rows} rows of {self.row_tokens}, got {len(self.ids)} tokens")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder} cannot be used: {error}; delete that folder to pack again") from None

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.n_rows * self.row_tokens

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of some rows (n, row_tokens) int64, and which of them are answers."""
        places = numbers[:, None] * self.row_tokens + np.arange(self.row_tokens)
        return self.ids[places].astype(np.int64), self.is_answer[places] == 1


class RowStream:
    """The rows in an endless order: each once in an epoch, in another pseudo-random order in every epoch.

    A target counts where the next token is an answer's. The last target of a row is ignored.

    Args:
        pad_id: the token of padding.
        seed: fixes the order.
    """

    def __init__(self, rows: Rows, pad_id: int, seed: int) -> None:
        self._rows, self._pad_id, self._seed = rows, pad_id, seed

    def batch(self, tokens_seen: int, seq_len: int, batch_tokens: int, rank: int = 0, n_ranks: int = 1) -> Batch:
        """Return a rank's part of the next ``batch_tokens`` tokens; ``TrainingStream.batch`` explains the rest."""
        check_batch(tokens_seen, seq_len, batch_tokens, rank, n_ranks)
        if seq_len != self._rows.row_tokens or tokens_seen % seq_len:
            raise ValueError(f"rows of {self._rows.row_tokens} are served whole, got {seq_len} from {tokens_seen}")
        n = batch_tokens // seq_len
        first, last = (tokens_seen // seq_len + n * r // n_ranks for r in (rank, rank + 1))
        ids, is_answer = self._rows.read(self._numbers(np.arange(first, last)))
        targets = np.full_like(ids, IGNORED_TARGET)
        targets[:, :-1] = np.where(is_answer[:, 1:], ids[:, 1:], IGNORED_TARGET)
        return Batch(ids, targets, ids != self._pad_id)

    def locate(self, token_index: int) -> Location:
        """Return the epoch of a token, the row as its document, and its place in the row."""
        place, offset = divmod(token_index, self._rows.row_tokens)
        return Location(0, place // self._rows.n_rows, int(self._numbers(np.array([place]))[0]), offset)

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        """Return the row at each place of the endless order."""
        return in_passes(places, self._rows.n_rows, self._seed)
