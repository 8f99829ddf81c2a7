"""Cutting a source into tasks: each reads a part, and all parts in order are the source."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_gpt.config import SourceConfig
from moe_gpt.data.corpus import expand_files, is_wanted, iterate_documents, may_be_cut, texts_of_dataset, texts_of_file
from moe_gpt.data.document import Document


class Piece(NamedTuple):
    """A file, or those of its lines that begin in a span of bytes."""

    path: Path
    span: tuple[int, int] | None


def cut_source(source: SourceConfig, n_tasks: int) -> list[list[Piece]]:
    """Return the pieces of files that each task reads; no pieces where the source has no files.

    Every task gets about the same number of bytes. A file that cannot be cut belongs to the task in whose part it
    begins.
    """
    pieces: list[list[Piece]] = [[] for _ in range(n_tasks)]
    paths = expand_files(source) if source.files else []
    ends = list(itertools.accumulate(path.stat().st_size for path in paths))
    starts = [ends[-1] * task // n_tasks for task in range(n_tasks)] if paths else []
    for path, begin, end in zip(paths, [0, *ends], ends, strict=False):
        first = bisect.bisect_right(starts, begin) - 1
        inside = starts[first + 1 : bisect.bisect_left(starts, end)] if may_be_cut(source, path) else []
        for task, span in enumerate(_spans([start - begin for start in inside], end - begin), first):
            pieces[task].append(Piece(path, span))
    return pieces


def _spans(cuts: list[int], size: int) -> Iterator[tuple[int, int] | None]:
    """Yield the spans of a file between the cuts; None for a file that is not cut."""
    yield from itertools.pairwise([0, *cuts, size]) if cuts else [None]


def read_part(source: SourceConfig, pieces: list[list[Piece]], task: int) -> Iterator[Document]:
    """Yield the documents of one task that have ``min_chars`` and are in the source's ``part``.

    ``deduplicate``, ``max_documents`` and ``max_tokens`` are for the whole source, so the merge applies them. The
    built-in corpus is small, and the first task reads all of it.
    """
    if source.builtin:
        whole = dataclasses.replace(source, deduplicate=False, max_documents=None)
        yield from iterate_documents(whole) if task == 0 else ()
        return
    for text in _texts(source, pieces, task):
        document = Document(text, text)
        if is_wanted(document, source):
            yield document


def _texts(source: SourceConfig, pieces: list[list[Piece]], task: int) -> Iterator[str]:
    if source.dataset:
        yield from texts_of_dataset(source, part=task, n_parts=len(pieces))
        return
    for path, span in pieces[task]:
        yield from texts_of_file(source, path, span)
