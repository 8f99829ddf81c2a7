"""A few mutations of ``fuzz.py`` each time, more of them in the slow tests."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
from fuzz import READERS, Found, fuzz


def found(name: str, n_mutations: int, seed: int) -> list[str]:
    return [f"mutation {n}: {ending}" for n, ending in fuzz(name, n_mutations, seed) if isinstance(ending, Found)]


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused(name):
    """No other exception, no hang, no memory beyond the file's, nothing outside of the folder."""
    assert not found(name, 12, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_changed_files_are_read_or_refused(name):
    """The same, with 1,000 mutations each; ``python tests/fuzz.py --mutations 10000`` does more."""
    assert not found(name, 1000, seed=2)


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda folder: [].pop(), "IndexError"),
        (lambda folder: (folder.parent / "outside" / "secret").read_bytes(), "outside"),
        (lambda folder: (folder.parent / "outside" / "new").write_bytes(b""), "outside"),
        (lambda folder: bytearray(200_000_000), "200 MB"),
        pytest.param(
            lambda folder: np.frombuffer(mmap.mmap(-1, 200_000_000), np.uint8).fill(1),
            "MB of memory",
            marks=pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone tells"),
        ),
    ],
    ids=["exception", "reads", "writes", "memory", "memory of a library"],
)
def test_the_fuzzer_sees_what_a_reader_must_not_do(read, what, monkeypatch):
    """A reader that breaks a promise only for changed files is found."""
    calls = iter([lambda folder: None] + [read] * 60)
    monkeypatch.setitem(READERS, "bad", READERS["index"]._replace(read=lambda folder: next(calls)(folder)))
    assert what in found("bad", 1, seed=1)[0]
