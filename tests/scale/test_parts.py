"""Parts are merged into the store that one process writes."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from moe_gpt.data.document import Document, is_held_out
from moe_gpt.data.encode import Encoder
from moe_gpt.data.token_store import build_store, dtype_of, write_store
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.scale.parts import Merge, Merged, Part, write_part

TEXTS = [f"{number % 31}: many words and {'more ' * (number % 31 % 7)}" for number in range(80)]
TOKENIZER = train_tokenizer(TEXTS, 300)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_parts(folder: Path, texts: list[str], n_parts: int, fraction: float) -> list[Path]:
    """Write the texts in parts, and return their folders."""
    encoder = Encoder(TOKENIZER, fraction)
    edges = [len(texts) * part // n_parts for part in range(n_parts + 1)]
    for part in range(n_parts):
        inside = texts[edges[part] : edges[part + 1]]
        digests = [hashlib.sha256(text.encode()).digest()[:16] for text in inside]
        documents = zip(encoder([Document(text, text) for text in inside]), digests, strict=True)
        write_part(folder / f"{part}", documents, TOKENIZER, lambda: 1.5)
    return [folder / f"{part}" for part in range(n_parts)]


def merge(parts: list[Path], folder: Path, fraction: float, **limits) -> Merged:
    """Merge parts into a store, and return what the merge found."""
    found, settings = [], {"deduplicate": False, "max_documents": None, "max_tokens": None, **limits}
    run = Merge(parts, TOKENIZER, **settings)
    write_store("mine", lambda writers: found.append(run(writers, lambda *_: None)), TOKENIZER, folder, fraction, None)
    return found[0]


def expected(texts: list[str], deduplicate=False, max_documents=None, max_tokens=None) -> tuple[list[str], int | None]:
    """Return the texts that one process would tokenise, and its limit of tokens."""
    return (list(dict.fromkeys(texts)) if deduplicate else texts)[:max_documents], max_tokens


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.01])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"deduplicate": True},
        {"max_documents": 33},
        {"max_tokens": 500},
        {"max_tokens": 501, "deduplicate": True},
        {"deduplicate": True, "max_documents": 30, "max_tokens": 10**6},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_parts", [1, 4])
def test_merged_parts_are_the_store_of_one_process(n_parts, limits, fraction, tmp_path):
    """Every file has the same bytes, with limits, exact repeats, and splits by document and by position."""
    texts, max_tokens = expected(TEXTS, **limits)
    encoder = Encoder(TOKENIZER, fraction)
    build_store("mine", [encoder([Document(text, text) for text in texts])], TOKENIZER, tmp_path / "one", fraction,
        max_tokens)  # fmt: skip
    found = merge(write_parts(tmp_path, TEXTS, n_parts, fraction), tmp_path / "merged", fraction, **limits)
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "one")
    assert found.n_documents == len(TEXTS)
    assert found.seconds == pytest.approx(1.5 * n_parts)


@pytest.mark.slow
def test_every_limit_of_tokens(tmp_path):
    """Each limit cuts at the token at which one process stops, also at the ends of documents and parts."""
    texts, encoder = TEXTS[:6], Encoder(TOKENIZER, 0.0)
    documents = [encoder([Document(text, text) for text in texts])]
    parts = write_parts(tmp_path, texts, 4, 0.0)
    total = sum(len(document.ids) + 1 for document in documents[0])
    for limit in range(2, total + 3):
        build_store("mine", documents, TOKENIZER, tmp_path / f"one-{limit}", 0.0, limit)
        merge(parts, tmp_path / f"merged-{limit}", 0.0, max_tokens=limit)
        assert files_of(tmp_path / f"merged-{limit}") == files_of(tmp_path / f"one-{limit}")


def test_counts(tmp_path):
    """Repeats and documents beyond the limits are counted; what is stored is the rest."""
    parts = write_parts(tmp_path, ["a b", "c d", "a b", "e f", "c d", "g h"], 2, 0.0)
    found = merge(parts, tmp_path / "merged", 0.0, deduplicate=True, max_documents=3)
    assert dataclasses.astuple(found)[:3] == (6, 2, 1)


def test_nothing_left_is_an_error(tmp_path):
    """Parts without documents give the error that one process gives."""
    with pytest.raises(InputError, match="source mine has no documents with text"):
        merge(write_parts(tmp_path, [], 2, 0.1), tmp_path / "merged", 0.1)


def test_damaged_part_is_refused(tmp_path):
    """A part whose tokens were cut off is named."""
    (part,) = write_parts(tmp_path, TEXTS, 1, 0.0)
    with open(part / "train.bin", "rb+") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=r"train\.bin has 50 tokens, but was written with [\d,]+; delete"):
        Part(part, dtype_of(TOKENIZER))


def test_part_is_replaced(tmp_path):
    """A task that is run again writes its part anew."""
    write_parts(tmp_path, TEXTS, 1, 0.0)
    (part,) = write_parts(tmp_path, TEXTS[:5], 1, 0.0)
    assert len(Part(part, dtype_of(TOKENIZER)).table) == 5


def test_texts_of_these_tests():
    """They have repeats; a fraction of 0.01 holds none of them out, so the store is split by position."""
    assert len(set(TEXTS)) < len(TEXTS)
    assert not any(is_held_out(Document(text, text), 0.01) for text in TEXTS)
    assert any(is_held_out(Document(text, text), 0.25) for text in TEXTS)
