"""Flat files of tokens: complete or absent, and always the documents that went in."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpt.data.document import Document, is_held_out
from moe_gpt.data.encode import Encoder, encode_documents
from moe_gpt.data.token_store import SPLITS, CheckedTokens, TokenStore, build_store, verify_store
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError

law = settings(max_examples=100, deadline=None, derandomize=True)

TOKENIZER = train_tokenizer([], vocab_size=257)
END = TOKENIZER.end_of_text_id
FRACTION = 0.3


def documents(*texts: str) -> list[Document]:
    """Return documents that are split by their own text, as those of files are."""
    return [Document(text, text) for text in texts]


TEXTS = [f"document {i} \u4e2d{'.' * i}" for i in range(40)]
DOCUMENTS = documents(*TEXTS)
TRAIN = [document for document in DOCUMENTS if not is_held_out(document, FRACTION)]
HELD_OUT = [document for document in DOCUMENTS if is_held_out(document, FRACTION)]


def tokens_of(group: list[Document]) -> list[int]:
    """Return what a split must hold: each document's tokens, each followed by end-of-text."""
    return [token for document in group for token in [*TOKENIZER.encode(document.text), END]]


def build(folder: Path, group, fraction: float = FRACTION, **options) -> tuple[TokenStore, TokenStore]:
    """Build a store and open both of its splits."""
    tokenizer = options.pop("tokenizer", TOKENIZER)
    encoded = encode_documents(group, Encoder(tokenizer, fraction))
    build_store("mine", encoded, tokenizer, folder, fraction, **options)
    return TokenStore(folder, "train"), TokenStore(folder, "validation")


class WideTokenizer:
    """A stand-in whose vocabulary is as large as asked and whose texts spell out their ids."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text_id = vocab_size, 0

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """Return the numbers that each text spells."""
        return [np.array([int(word) for word in text.split()], dtype=np.uint32) for text in texts]

    def token_bytes(self) -> np.ndarray:
        """Return a length for every id."""
        return np.ones(self.vocab_size, dtype=np.int64)


def test_tokens_are_the_documents_each_followed_by_end_of_text(tmp_path):
    """Each split is its documents in order, each followed by end-of-text, and no document is in both or neither."""
    train, validation = build(tmp_path / "store", DOCUMENTS)
    assert len(TRAIN) > 20
    assert len(HELD_OUT) > 5
    assert train.tokens[:].tolist() == tokens_of(TRAIN)
    assert validation.tokens[:].tolist() == tokens_of(HELD_OUT)


def test_many_documents_keep_their_order(tmp_path):
    """More documents than are tokenised at once come out in the order they went in, from any iterable."""
    group = documents(*(f"{i}" for i in range(700)))
    train, _ = build(tmp_path / "store", iter(group))
    assert train.tokens[:].tolist() == tokens_of([d for d in group if not is_held_out(d, FRACTION)])


def test_document_ends_and_locate_agree_with_the_documents(tmp_path):
    """Every token's document and offset are those it was written from; each document's last token is end-of-text."""
    train, _ = build(tmp_path / "store", DOCUMENTS)
    expected = [(i, j) for i, d in enumerate(TRAIN) for j in range(len(TOKENIZER.encode(d.text)) + 1)]
    assert [train.locate(position) for position in range(len(train))] == expected
    assert train.document_ends.tolist() == [i + 1 for i, token in enumerate(train.tokens[:]) if token == END]


def test_bytes_are_counted_for_each_split(tmp_path):
    """n_bytes is the UTF-8 length of a split's texts."""
    train, validation = build(tmp_path / "store", DOCUMENTS)
    assert train.n_bytes == sum(len(d.text.encode()) for d in TRAIN)
    assert validation.n_bytes == sum(len(d.text.encode()) for d in HELD_OUT)


def test_meta_counts_what_the_files_hold(tmp_path):
    """The meta file's counts are those of the files."""
    train, validation = build(tmp_path / "store", DOCUMENTS)
    assert train.meta["n_tokens"] == {"train": len(train), "validation": len(validation)}
    assert train.meta["n_documents"] == {"train": len(TRAIN), "validation": len(HELD_OUT)}


def test_digest_identifies_the_content(tmp_path):
    """Equal documents give equal digests; another word, another order or another split gives another."""
    changed = [*DOCUMENTS[:-1], Document("other", DOCUMENTS[-1].split_key)]
    groups = [DOCUMENTS, DOCUMENTS, changed, DOCUMENTS[::-1]]
    digests = [build(tmp_path / str(i), group)[0].digest for i, group in enumerate(groups)]
    digests.append(build(tmp_path / "other split", DOCUMENTS, fraction=0.6)[0].digest)
    assert digests[0] == digests[1]
    assert len(set(digests[1:])) == 4


@pytest.mark.parametrize("max_tokens", [100, 101, 200])
def test_max_tokens_stops_with_exactly_so_many(tmp_path, max_tokens):
    """Both splits together hold max_tokens tokens: the first of the documents, the last one cut and ended."""
    train, validation = build(tmp_path / "store", DOCUMENTS, max_tokens=max_tokens)
    assert len(train) + len(validation) == max_tokens
    for store, group in ((train, TRAIN), (validation, HELD_OUT)):
        whole = len(store) - 1
        assert store.tokens[:whole].tolist() == tokens_of(group)[:whole]
        assert store.tokens[-1:] == END


def test_max_tokens_above_the_text_changes_nothing(tmp_path):
    """A limit that the text does not reach gives the same store as none."""
    assert build(tmp_path / "a", DOCUMENTS, max_tokens=10**6)[0].digest == build(tmp_path / "b", DOCUMENTS)[0].digest


def test_max_tokens_reads_no_more_documents_than_it_needs(tmp_path):
    """An endless source with a limit ends."""
    endless = (Document(f"{i}", f"text {i} " * 300) for i in itertools.count())
    train, _ = build(tmp_path / "store", endless, max_tokens=50)
    assert len(train) > 20


def test_bytes_of_a_cut_document_are_those_that_were_kept(tmp_path):
    """Where max_tokens cuts a document, n_bytes counts the text of the tokens that were kept."""
    train, validation = build(tmp_path / "store", DOCUMENTS, max_tokens=100)
    n_bytes = TOKENIZER.token_bytes()
    assert (train.n_bytes, validation.n_bytes) == (n_bytes[train.tokens[:]].sum(), n_bytes[validation.tokens[:]].sum())


@pytest.mark.parametrize("fraction", [0.03, 0.3])
@pytest.mark.parametrize("texts", [["one long book. " * 40], ["c" * 300, "a" * 300]])
def test_documents_all_on_one_side_are_split_by_position(tmp_path, texts, fraction):
    """Where every document fell on one side, the last share of the tokens is held out instead, none lost."""
    group = documents(*texts)
    assert len({is_held_out(document, fraction) for document in group}) == 1
    train, validation = build(tmp_path / "store", group, fraction)
    assert train.tokens[:].tolist() + validation.tokens[:].tolist() == tokens_of(group)
    assert len(validation) == int(len(tokens_of(group)) * fraction)
    assert train.document_ends[-1] == len(train)
    assert validation.document_ends[-1] == len(validation)


def test_split_by_position_may_fall_between_two_documents(tmp_path):
    """A cut that meets a document's end gives each split its whole documents."""
    group = [d for d in documents(*(f"number {i:02}" for i in range(99))) if not is_held_out(d, 0.5)][:2]
    train, validation = build(tmp_path / "store", group, 0.5)
    assert train.document_ends.tolist() == validation.document_ends.tolist() == [10]


def test_digest_depends_on_where_the_splits_meet(tmp_path):
    """The same tokens cut at another place are other data."""
    book = documents("one long book. " * 40)
    assert build(tmp_path / "a", book, 0.1)[0].digest != build(tmp_path / "b", book, 0.2)[0].digest


def test_held_out_book_is_split_by_position_too(tmp_path):
    """A single document whose hash puts it on the validation side is still mostly for training."""
    book = next(d for d in (Document("word " * 99, str(i)) for i in range(99)) if is_held_out(d, 0.1))
    train, validation = build(tmp_path / "store", [book], 0.1)
    assert (len(train), len(validation)) == (447, 49)
    assert train.tokens[:].tolist() + validation.tokens[:].tolist() == tokens_of([book])


@pytest.mark.parametrize("group", [[], iter(())])
def test_source_without_documents_is_refused(tmp_path, group):
    """No documents is an error with the source's name."""
    with pytest.raises(InputError, match="source mine has no documents"):
        build(tmp_path / "store", group)


@pytest.mark.parametrize(("text", "fraction"), [("abc", 0.03), ("a" * 50, 0.03), ("ab", 0.5)])
def test_source_too_small_for_two_splits_is_refused(tmp_path, text, fraction):
    """Too few tokens to hold some out is an error with the source, the count and the fraction."""
    with pytest.raises(InputError, match=rf"source mine has {len(text) + 1} tokens.*validation_fraction={fraction}"):
        build(tmp_path / "store", documents(text), fraction)


@pytest.mark.parametrize("first", [TRAIN[0], HELD_OUT[0]], ids=["train", "validation"])
def test_no_split_is_too_short_to_have_a_target(tmp_path, first):
    """A split has at least two tokens, a token and its target, or the store is refused: max_tokens cuts none to one."""
    second = HELD_OUT[0] if first is TRAIN[0] else TRAIN[0]
    n_first = len(tokens_of([first]))
    try:
        stores = build(tmp_path / "store", [first, second], max_tokens=n_first + 1)
    except InputError:
        return
    assert min(len(store) for store in stores) >= 2


def failing(error: BaseException):
    """Yield some documents, then fail as an unreadable file or Ctrl-C does."""
    yield from DOCUMENTS
    raise error


@pytest.mark.parametrize("error", [InputError("unreadable"), RuntimeError("bug"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(tmp_path, error):
    """A store that cannot be completed leaves no folder, temporary ones included."""
    with pytest.raises(type(error)):
        build(tmp_path / "cache" / "store", failing(error))
    assert list((tmp_path / "cache").iterdir()) == []


def test_refusal_leaves_nothing_behind(tmp_path):
    """A source that turns out too small leaves no folder either."""
    with pytest.raises(InputError):
        build(tmp_path / "cache" / "store", documents("x"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_success_leaves_only_the_store(tmp_path):
    """A finished store is one folder, its temporary name is gone."""
    build(tmp_path / "cache" / "store", DOCUMENTS)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["store"]


def test_store_that_is_there_is_not_replaced(tmp_path):
    """Whoever builds must look first."""
    first, _ = build(tmp_path / "cache" / "store", DOCUMENTS)
    with pytest.raises(OSError, match="not empty"):
        build(tmp_path / "cache" / "store", DOCUMENTS[:20])
    assert TokenStore(tmp_path / "cache" / "store", "train").digest == first.digest
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["store"]


FILES = ["meta.json", *(f"{split}{end}" for split in SPLITS for end in (".bin", ".sha256", "_ends.npy"))]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "delete", "flip"])
def test_damaged_store_is_named(tmp_path, name, damage):
    """Each file in each way, with what to do; a flipped bit of the tokens is found when they are read."""
    folder = tmp_path / "store"
    build(folder, DOCUMENTS)
    verify_store(folder)
    content = bytearray((folder / name).read_bytes())
    if damage == "delete":
        (folder / name).unlink()
    elif damage == "truncate":
        (folder / name).write_bytes(content[: len(content) // 2])
    elif name.endswith(".bin"):
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        verify_store(folder)
    else:
        (folder / name).write_bytes(b"x" + content[1:])
    with pytest.raises(InputError, match=rf"{folder}.*: .*; delete that folder to tokenise the source again"):
        read_all(folder)


def read_all(folder: Path) -> None:
    """Open a store as a run does and read all of it."""
    verify_store(folder)
    for split in SPLITS:
        TokenStore(folder, split).tokens[:]


def test_damaged_document_ends_are_found_when_a_document_is_looked_up(tmp_path):
    """Nothing else needs them."""
    train, _ = build(tmp_path / "store", DOCUMENTS)
    path = tmp_path / "store" / "train_ends.npy"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    assert TokenStore(tmp_path / "store", "train", check=False).locate(0) == (0, 0)
    with pytest.raises(InputError, match=r"train_ends.npy has changed since it was written"):
        TokenStore(tmp_path / "store", "train").locate(0)


BLOCK = 2**20 // 2


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> tuple[Path, np.ndarray, bytes]:
    """A file of three blocks and a half, its ids, and the digests of its blocks."""
    ids = np.random.default_rng(0).integers(0, 2**16, int(3.5 * BLOCK), dtype=np.uint16)
    path = tmp_path_factory.mktemp("blocks") / "train.bin"
    ids.tofile(path)
    pieces = [ids[start : start + BLOCK].tobytes() for start in range(0, len(ids), BLOCK)]
    return path, ids, b"".join(hashlib.sha256(piece).digest() for piece in pieces)


PLACES = [
    slice(5), slice(BLOCK - 1, BLOCK + 1), slice(BLOCK, 2 * BLOCK), slice(-3, None), slice(7, 7), slice(None),
    np.array([3]), np.array([BLOCK, 5, 3 * BLOCK]), np.array([2 * BLOCK - 1]),
]  # fmt: skip


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_damage_is_found_exactly_where_it_is_read(blocks, tmp_path, places, damaged):
    """Whatever touches a damaged block is refused, each time; everything else reads what was written."""
    path, ids, digests = blocks
    touches_damage = damaged in np.arange(len(ids))[places] // BLOCK
    copy = tmp_path / "train.bin"
    wrong = ids.copy()
    wrong[damaged * BLOCK + 17] ^= 1
    wrong.tofile(copy)
    assert (CheckedTokens(path, "uint16", digests)[places] == ids[places]).all()
    tokens = CheckedTokens(copy, "uint16", digests)
    for _ in range(2):
        if touches_damage:
            with pytest.raises(InputError, match=rf"train\.bin: tokens from {damaged * BLOCK:,} to .* differs"):
                tokens[places]
        else:
            assert (tokens[places] == ids[places]).all()
    assert (CheckedTokens(copy, "uint16")[places] == wrong[places]).all()  # check switched off


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(tmp_path, vocab_size, dtype):
    """Up to 65,536 ids take two bytes each, more take four; the largest id survives."""
    group = documents(*(f"{vocab_size - 1} {i}" for i in range(1, 30)))
    train, _ = build(tmp_path / "store", group, tokenizer=WideTokenizer(vocab_size))
    assert train.tokens[:].dtype == np.dtype(dtype)
    assert train.tokens[:1] == train.tokens[:].max() == vocab_size - 1
    assert (tmp_path / "store" / "train.bin").stat().st_size == len(train) * np.dtype(dtype).itemsize


def test_progress_is_reported_up_to_the_end(tmp_path):
    """The last report has all documents and all tokens."""
    reports = []
    train, validation = build(tmp_path / "store", DOCUMENTS, report=lambda *counts: reports.append(counts))
    assert reports[-1] == (len(DOCUMENTS), len(train) + len(validation))


@law
@given(st.text(st.characters()), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_held_out_documents_stay_so_when_more_are_held_out(key, a, b):
    """A larger fraction holds out all that a smaller one does, for any key; the text does not matter."""
    low, high = sorted((a, b))
    assert is_held_out(Document("x", key), low) <= is_held_out(Document("y", key), high)


def test_share_that_is_held_out_is_the_fraction():
    """Of 4,000 keys about the fraction is held out; 5 standard deviations, so a false alarm once in 3 million."""
    held_out = sum(is_held_out(Document("", str(i)), 0.1) for i in range(4000))
    assert abs(held_out - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5
