"""Turning documents into token ids, in order, with as many processes as help."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from moe_gpt.data.document import Document, is_held_out
from moe_gpt.data.fill_in_the_middle import FillInTheMiddle
from moe_gpt.data.tokenizer import Tokenizer, in_groups

_GROUP_CHARS = 1 << 19
_GROUPS_BEFORE_PROCESSES = 32
_GROUPS_AHEAD = 2
_MOST_PROCESSES = 16


class EncodedDocument(NamedTuple):
    """A document's ids, uint32, whether it belongs to the validation split, and the bytes of its text in UTF-8."""

    ids: np.ndarray
    is_held_out: bool
    n_bytes: int


class Encoder:
    """Encodes groups of documents. It can be sent to other processes.

    Args:
        validation_fraction: share of documents held out by hash.
        fim_rate: share of the training documents that are rearranged for fill-in-the-middle.
        fim_spm_rate: share of the rearranged documents in the SPM form.
    """

    def __init__(
        self, tokenizer: Tokenizer, validation_fraction: float, fim_rate: float = 0.0, fim_spm_rate: float = 0.5
    ) -> None:
        self.tokenizer, self._validation_fraction = tokenizer, validation_fraction
        self._rearrange = FillInTheMiddle(tokenizer, fim_rate, fim_spm_rate) if fim_rate else None

    def __call__(self, documents: list[Document]) -> list[EncodedDocument]:
        """Return the ids of each document, without end-of-text."""
        held_out = [is_held_out(document, self._validation_fraction) for document in documents]
        encoded = self.tokenizer.encode_arrays([document.text for document in documents])
        return list(map(self._finished, documents, encoded, held_out))

    def _finished(self, document: Document, ids: np.ndarray, is_held_out: bool) -> EncodedDocument:
        """Rearrange a training document, if it is one of the chosen share."""
        n_bytes = len(document.text.encode())
        if self._rearrange is None or is_held_out:
            return EncodedDocument(ids, is_held_out, n_bytes)
        rearranged = self._rearrange(document.text)
        return EncodedDocument(ids if rearranged is None else rearranged, is_held_out, n_bytes)


def encode_documents(
    documents: Iterable[Document], encoder: Encoder, processes: int | None = None, say: Callable[[str], None] = print
) -> Generator[list[EncodedDocument], None, None]:
    """Yield the documents' ids in groups, in the documents' order, whatever the number of processes.

    This process encodes the first 16 MB of text with the library's threads. Only a longer text is worth the start of
    worker processes. Each of them has at most two groups of about half a MB waiting.

    Args:
        documents: an iterator that is read only as far as needed.
        processes: None is one for each core that this process may use, at most 16.
        say: shows a note if no worker process can start.
    """
    groups = in_groups(documents, lambda document: len(document.text), _GROUP_CHARS)
    for group in itertools.islice(groups, _GROUPS_BEFORE_PROCESSES):
        yield encoder(group)
    processes = processes or min(_MOST_PROCESSES, available_cores())
    first = next(groups, None) if processes > 1 else None
    if first is None:
        yield from map(encoder, groups)
        return
    groups = itertools.chain([first], groups)
    pool = _start_pool(encoder, processes)
    if pool is None:
        say(
            "Worker processes could not start, so one process tokenises everything, more slowly. In a script, put the "
            "call under `if __name__ == '__main__':`."
        )
        yield from map(encoder, groups)
        return
    yield from _encode_in_pool(groups, pool, _GROUPS_AHEAD * processes)


def _encode_in_pool(
    groups: Iterable[list[Document]], pool: ProcessPoolExecutor, n_ahead: int
) -> Generator[list[EncodedDocument], None, None]:
    under_way: deque[Future[list[EncodedDocument]]] = deque()
    try:
        for group in groups:
            under_way.append(pool.submit(_encode_group, group))
            if len(under_way) > n_ahead:
                yield under_way.popleft().result()
        for future in under_way:
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_pool(encoder: Encoder, processes: int) -> ProcessPoolExecutor | None:
    """Return a pool that has answered once; None if its processes die."""
    refuse_in_starting_process()
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(encoder,))
    try:
        pool.submit(_encode_group, []).result()
    except BrokenProcessPool:
        pool.shutdown()
        return None
    return pool


def refuse_in_starting_process() -> None:
    """End a worker process that is still starting, because it is running its parent's unguarded script again.

    The parent notices, and encodes alone.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing checks the same
        raise SystemExit(1)


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()


def end_with_parent() -> None:
    """Leave the end of this worker process to its parent: Ctrl-C does not end it, the parent's death does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_group(documents: list[Document]) -> list[EncodedDocument]:
    assert _worker_encoder is not None
    return _worker_encoder(documents)
