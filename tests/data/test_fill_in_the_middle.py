"""Documents rearranged for fill-in-the-middle: nothing is lost, and it follows from the text alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpt.config import DataConfig, SourceConfig, TokenizerConfig
from moe_gpt.data.fill_in_the_middle import MIDDLE, PREFIX, SUFFIX, FillInTheMiddle
from moe_gpt.data.prepare import prepare_data
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import ConfigError, InputError

TOKENS = (PREFIX, MIDDLE, SUFFIX)
TOKENIZER = train_tokenizer(["def f(x):\n    return x\n" * 9], 300, special_tokens=TOKENS)
PRE, MID, SUF = (TOKENIZER.special_id(token) for token in TOKENS)


def parts(ids: list[int]) -> tuple[str, str, str, str]:
    """Return the form and the texts of prefix, middle and suffix."""
    assert Counter(i for i in ids if i in (PRE, MID, SUF)) == {PRE: 1, MID: 1, SUF: 1}
    at = {index: ids.index(index) for index in (PRE, MID, SUF)}
    assert at[PRE] == 0
    assert at[PRE] < at[SUF] < at[MID]
    decode = TOKENIZER.decode
    suffix = decode(ids[at[SUF] + 1 : at[MID]])
    if at[SUF] == 1 and at[MID] > 1:
        return "SPM or empty prefix", "", decode(ids[at[MID] + 1 :]), suffix
    return "PSM", decode(ids[1 : at[SUF]]), decode(ids[at[MID] + 1 :]), suffix


@settings(deadline=None)
@given(st.text(min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 1.0]))
def test_parts_are_the_document(text, spm_rate):
    """Prefix, middle and suffix, put together, are the text again."""
    ids = FillInTheMiddle(TOKENIZER, 1.0, spm_rate)(text).tolist()
    _, prefix, middle, suffix = parts(ids)
    assert prefix + middle + suffix == text


def test_forms_by_hand():
    """PSM has its prefix first; SPM has nothing between the first two sentinels."""
    texts = [f"document {i} has some words" for i in range(200)]
    psm = [FillInTheMiddle(TOKENIZER, 1.0, 0.0)(text).tolist() for text in texts]
    spm = [FillInTheMiddle(TOKENIZER, 1.0, 1.0)(text).tolist() for text in texts]
    assert all(ids[:2] == [PRE, SUF] for ids in spm)
    assert sum(ids[1] != SUF for ids in psm) > 180  # a prefix may be empty


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_share_of_documents(rate):
    """About the rate, and each document by itself: the same every time."""
    fim = FillInTheMiddle(TOKENIZER, rate, 0.5)
    chosen = [fim(f"document {i}") is not None for i in range(1000)]
    assert sum(chosen) / 1000 == pytest.approx(rate, abs=0.05)
    assert chosen == [fim(f"document {i}") is not None for i in range(1000)]


def test_tokenizer_without_sentinels_is_refused():
    """With those it lacks, and where to add them."""
    with pytest.raises(InputError, match=r"<\|fim_prefix\|>, .*add them to data.tokenizer.special_tokens"):
        FillInTheMiddle(train_tokenizer(["text"], 300), 0.5, 0.5)


def test_source_with_a_rate(tmp_path, monkeypatch):
    """Training documents are rearranged, held-out ones never; their bytes are counted as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Path("a").mkdir()
    for i in range(40):
        Path(f"a/{i}.txt").write_text(f"number {i} of the documents\n" * 4)

    def prepare(rate: float):
        sources = (SourceConfig(name="a", files="a/*.txt", fim_rate=rate),)
        tokenizer = TokenizerConfig(vocab_size=300, special_tokens=TOKENS)
        config = DataConfig(tokenizer=tokenizer, sources=sources, validation_fraction=0.3, cache_dir="cache")
        return prepare_data(config, say=lambda text: None)

    plain, half, whole = (prepare(rate) for rate in (0.0, 0.5, 1.0))
    mid = plain.tokenizer.special_id(MIDDLE)
    counts = [int((data.sources[0].train.tokens[:] == mid).sum()) for data in (plain, half, whole)]
    n_documents = len(plain.sources[0].train.document_ends)
    assert counts[0] == 0
    assert 0 < counts[1] < counts[2] == n_documents
    assert not (whole.sources[0].validation.tokens[:] == mid).any()
    assert whole.sources[0].train.n_bytes == plain.sources[0].train.n_bytes


def test_special_tokens_have_the_first_ids():
    """End-of-text 0, then the others; text that spells one stays text."""
    assert TOKENIZER.special_tokens() == {"<|endoftext|>": 0, PREFIX: 1, MIDDLE: 2, SUFFIX: 3}
    ids = TOKENIZER.encode(f"x{MIDDLE}y")
    assert 2 not in ids
    assert TOKENIZER.decode(ids) == f"x{MIDDLE}y"
    assert TOKENIZER.vocab_size <= 300


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"special_tokens": ["<a>", "<a>"]}, "must differ from each other"),
        ({"special_tokens": ["<|endoftext|>"]}, "must differ from each other and from end_of_text"),
        ({"special_tokens": [""]}, "must differ"),
        ({"special_tokens": ["<a>", "<b>"], "vocab_size": 258}, "must leave room for 256 bytes and 3 special tokens"),
        ({"special_tokens": ["<a>"], "file": "x.json"}, "is for a tokenizer that is trained"),
    ],
)
def test_impossible_special_tokens_are_refused(keys, problem):
    """By name."""
    with pytest.raises(ConfigError, match=problem):
        TokenizerConfig.from_mapping(keys)
