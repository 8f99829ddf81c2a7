"""The training stream in closed form: any of its tokens follows from ``(seed, token index)``; there is no loader state.

The stream is one endless sequence of tokens, cut into *chunks* of ``chunk_tokens``. A chunk is contiguous text of one
source, except a chunk in which one epoch of the source ends and the next begins.

- *Mixture.* Integer arithmetic decides which source each chunk comes from, one source after another, as in Bresenham's
  line. In any window of the stream, each source has its share to within as many chunks as there are sources.
- *Epochs.* Each pass over a source visits every token exactly once before the next begins. The text is rotated by a
  random amount and cut into chunks, and the chunks are visited in a pseudo-random order.
- *Order.* The order is a Feistel permutation (Luby and Rackoff 1988) with cycle walking (Black and Rogaway 2002). It
  needs no memory and no start-up time, however large the source.

A step reads the tokens ``[tokens_seen, tokens_seen + batch_tokens)``. Therefore neither a resume nor a change of
sequence length or batch size skips or repeats a token. The target of a token is the next token in its own text, also
at the end of a chunk or sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_ONE = 1 << 32
_FEISTEL_ROUNDS = 6


class Tokens(Protocol):
    """Token ids that can be read by slice or by an array of positions."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any) -> np.ndarray: ...


class Text(Protocol):
    """The part of a token store that the stream uses."""

    @property
    def tokens(self) -> Tokens:
        """All token ids, in order."""

    def locate(self, position: int) -> tuple[int, int]:
        """Return document and offset of a position."""


class Batch(NamedTuple):
    """Token ids and the ids that follow them, (n_sequences, seq_len) int64 each."""

    inputs: np.ndarray
    targets: np.ndarray
    is_text: np.ndarray | None = None
    """False for padding, (n_sequences, seq_len); None if there is none."""


class Location(NamedTuple):
    """The origin of a token of the stream."""

    source: int
    epoch: int
    document: int
    offset: int


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map indices below ``size`` one-to-one onto indices below ``size``, pseudo-randomly by ``key``."""
    half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = np.random.SeedSequence(key).generate_state(_FEISTEL_ROUNDS, np.uint64)
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():  # cycle walking: repeat until the result is below size; the domain is at most 4 x size
        left, right = result[outside] >> half_bits, result[outside] & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & half_mask)
        result[outside] = (left << half_bits) | right
        outside = result >= size
    return result.astype(np.int64)


def in_passes(places: np.ndarray, n_items: int, seed: int) -> np.ndarray:
    """Return the item at each place of an endless order: each of n once in a pass, in another order in every pass."""
    items = np.empty_like(places)
    for number in np.unique(places // n_items).tolist():
        mine = places // n_items == number
        items[mine] = permute(places[mine] % n_items, n_items, key_of(seed, number))
    return items


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int) -> int:
    """Return a key for ``permute`` that follows from some numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "big")


def check_batch(tokens_seen: int, seq_len: int, batch_tokens: int, rank: int, n_ranks: int) -> None:
    """Raise ``ValueError`` for a batch that no stream has."""
    if seq_len < 1 or batch_tokens % seq_len:
        raise ValueError(f"batch_tokens must be a multiple of seq_len={seq_len}, got {batch_tokens}")
    if tokens_seen < 0 or batch_tokens < 1:
        raise ValueError(f"the stream starts at token 0, got {batch_tokens} tokens from {tokens_seen}")
    if not 0 <= rank < n_ranks:
        raise ValueError(f"rank must be below n_ranks={n_ranks}, got {rank}")


class TrainingStream:
    """The mixture of several sources as one sequence of tokens.

    Args:
        texts: one token store for each source.
        shares: each source's share of the tokens; they need not sum to 1.
        seed: fixes the order.
        chunk_tokens: contiguous tokens of one source; a multiple of every sequence length keeps sequences whole.
    """

    def __init__(self, texts: Sequence[Text], shares: Sequence[float], seed: int, chunk_tokens: int) -> None:
        if not texts or len(texts) != len(shares) or min(shares) <= 0:
            raise ValueError(f"shares must be positive, one for each of {len(texts)} sources, got {list(shares)}")
        if any(len(text.tokens) == 0 for text in texts):
            raise ValueError("every source must have tokens, got an empty one")
        self._texts, self._seed, self._chunk_tokens = list(texts), seed, chunk_tokens
        self._numerators = [round(_ONE * share / sum(shares[i:])) for i, share in enumerate(shares)]

    def batch(self, tokens_seen: int, seq_len: int, batch_tokens: int, rank: int = 0, n_ranks: int = 1) -> Batch:
        """Return the next ``batch_tokens`` tokens of the stream as sequences of ``seq_len``, with their targets.

        Each data-parallel rank gets a contiguous part of the sequences. The parts of all ranks in order are the whole
        batch, and their sizes differ by at most one sequence.
        """
        check_batch(tokens_seen, seq_len, batch_tokens, rank, n_ranks)
        n_sequences = batch_tokens // seq_len
        first, last = (n_sequences * r // n_ranks for r in (rank, rank + 1))
        tokens_seen, batch_tokens = tokens_seen + first * seq_len, (last - first) * seq_len
        source, position = self._source_positions(tokens_seen, batch_tokens)
        inputs, targets = np.empty((2, batch_tokens), np.int64)
        for index in np.unique(source).tolist():
            mine, tokens = source == index, self._texts[index].tokens
            _, place = self._text_positions(index, position[mine])
            inputs[mine], targets[mine] = tokens[place], tokens[(place + 1) % len(tokens)]
        return Batch(inputs.reshape(-1, seq_len), targets.reshape(-1, seq_len))

    def locate(self, token_index: int) -> Location:
        """Return source, epoch, document and offset of one token of the stream."""
        if token_index < 0:
            raise ValueError(f"the stream starts at token 0, got {token_index}")
        source, position = self._source_positions(token_index, 1)
        epoch, place = self._text_positions(int(source[0]), position)
        return Location(int(source[0]), int(epoch[0]), *self._texts[source[0]].locate(int(place[0])))

    def _source_positions(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each token's source in [start, start + length), and its position in the source's endless stream."""
        U = self._chunk_tokens
        first, last = start // U, (start + length - 1) // U
        sources, counts = self._mixture(first, last + 1)
        token = np.arange(start, start + length)
        chunk = token // U - first
        return sources[chunk], counts[chunk] * U + token % U

    def _mixture(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each chunk in [start, end) and how many chunks that source had before it."""
        sources = np.full(end - start, len(self._texts) - 1)
        counts = np.empty(end - start, dtype=np.int64)
        undecided = np.arange(end - start)
        for index, numerator in enumerate(self._numerators):
            # Of the first j chunks that earlier sources left, this source takes (j·numerator + 1/2) // 1.
            base, rest = divmod(start * numerator + _ONE // 2, _ONE)
            taken = base + (rest + np.arange(len(undecided) + 1, dtype=np.int64) * numerator) // _ONE
            is_mine = np.diff(taken) > 0
            sources[undecided[is_mine]] = index
            counts[undecided[is_mine]] = taken[:-1][is_mine]
            undecided, start = undecided[~is_mine], start - base
        return sources, counts

    def _text_positions(self, index: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch of each position in a source's endless stream, and its place in the text."""
        n, U = len(self._texts[index].tokens), self._chunk_tokens
        epoch = position // n
        place = np.empty_like(position)
        for e in np.unique(epoch):
            mine = epoch == e
            offset = position[mine] - e * n
            # Chunks lie on multiples of U of the endless stream, so an epoch may start and end within a chunk.
            head = -int(e) * n % U
            n_chunks = max(0, n - head) // U
            chunk = (offset - head) // U
            is_whole = (chunk >= 0) & (chunk < n_chunks)
            if is_whole.any():
                shuffled = permute(chunk[is_whole], n_chunks, key_of(self._seed, index, int(e)))
                offset[is_whole] = head + shuffled * U + (offset[is_whole] - head) % U
            rotation = key_of(self._seed, index, int(e), 1) % n
            place[mine] = (offset + rotation) % n
        return epoch, place


def validation_rows(tokens: Tokens, seq_len: int, max_tokens: int) -> Batch:
    """Cut the first held-out tokens, at most ``max_tokens``, into sequences with targets.

    Text shorter than one sequence gives one shorter sequence.
    """
    n_targets = min(max_tokens, len(tokens) - 1)
    seq_len = min(seq_len, n_targets)
    n_targets -= n_targets % seq_len
    window = np.asarray(tokens[: n_targets + 1], dtype=np.int64)
    return Batch(window[:-1].reshape(-1, seq_len), window[1:].reshape(-1, seq_len))
