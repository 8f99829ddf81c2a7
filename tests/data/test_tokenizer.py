"""Byte-level BPE that round-trips every text and that other runtimes recognise."""

from __future__ import annotations

import copy
import json
import os
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moe_gpt.data.tokenizer import END_OF_TEXT, Tokenizer, _cut_at_words, _cut_long_words, train_tokenizer
from moe_gpt.errors import InputError

law = settings(max_examples=150, deadline=None, derandomize=True)

WORDS = "the cat sat on the mat, the dog's caf\u00e9 \u4e2d\u6587 \U0001f600 and then there were 12 others\n"
TOKENIZER = train_tokenizer([WORDS * 20], vocab_size=290)
BYTES = train_tokenizer([], vocab_size=257)


@law
@given(st.text())
def test_every_text_round_trips(text):
    """What encode makes of a text decodes to the text, for any Unicode."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@law
@given(st.text())
def test_token_bytes_add_up_to_the_text(text):
    """The bytes of a text's tokens sum to its length in UTF-8, so encode adds nothing to it."""
    assert TOKENIZER.token_bytes()[TOKENIZER.encode(text)].sum() == len(text.encode())


@law
@given(st.lists(st.text(), max_size=5))
def test_encoding_a_batch_is_encoding_each_text(texts):
    """A batch gives what encode gives, text by text."""
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


@law
@given(st.text(st.sampled_from(" \n\tas'12.\u00e9\u3000\u3002\uff0c\u00a0\x1c\u4e2d"), max_size=60), st.integers(1, 9))
def test_encoding_in_pieces_is_encoding_at_once(text, piece_chars):
    """Where a long text is cut does not change its ids."""
    whole = TOKENIZER.encode(text)
    cut = copy.copy(TOKENIZER)
    cut._piece_chars = piece_chars
    assert cut.encode(text) == whole


def test_long_text_takes_little_memory():
    """It is encoded in pieces, of which few are under way at once."""
    for words in ("some words ", "c2FtZQ8", "\u4e2d\u6587\uff0c\u5b57\u3002"):
        assert len(list(_cut_at_words(words * 10_000, 1000))) > 30
    assert TOKENIZER._piece_chars


def test_trainer_sees_no_long_word():
    """A text without spaces is cut for the trainer, whose time grows with the square of a word; all of it is there."""
    text = "a" * 3000 + " b " + "\u4e2d" * 600 + " " * 2000 + "c" * 512
    pieces = list(_cut_long_words(text))
    assert "".join(pieces) == text
    assert max(len(word) for piece in pieces for word in re.findall(r"\S+|\s+", piece)) == 512
    assert list(_cut_long_words(WORDS * 100)) == [WORDS * 100]
    assert train_tokenizer(["ab" * 100_000], 300).encode("abab") != list(b"abab")


@pytest.mark.parametrize(
    ("normalizer", "before", "after"),
    [
        (normalizers.Strip(), "a\n", "a"),
        (normalizers.Lowercase(), "A", "a"),
        (normalizers.NFKC(), "\ufb01", "fi"),
        (None, "a \n", None),
        (None, "\n a", None),
    ],
)
def test_first_loss(normalizer, before, after):
    """Text that is lost is named, outer spaces too."""
    backend = tokenizers.Tokenizer.from_str(BYTES.to_json())
    backend.normalizer = normalizer
    loss = Tokenizer(backend).first_loss(before)
    assert (loss is None) == (after is None)
    if loss and after:
        common = os.path.commonprefix([before, after])
        assert loss == (before.removeprefix(common), after.removeprefix(common))


def test_space_that_decoding_puts_before_a_text_loses_nothing():
    """GPT-2's prefix space is gained, not lost."""
    spec = json.loads(BYTES.to_json())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    assert tokenizer.decode(tokenizer.encode("a")) == " a"
    assert tokenizer.first_loss("a") is None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"added_tokens": [{"id": 1, "content": "on the", "single_word": False, "lstrip": False, "rstrip": False,
                           "normalized": False, "special": False}]},
    ],
    ids=["normalizer", "prefix", "no regex", "none", "added"],
)  # fmt: skip
def test_other_tokenizers_encode_a_text_at_once(change, tmp_path):
    """Where a cut might change the ids, none is made."""
    spec = json.loads(TOKENIZER.to_json())
    if "added_tokens" in change:
        change["added_tokens"] += spec["added_tokens"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec | change), encoding="utf-8")
    assert Tokenizer.load(path)._piece_chars is None


def test_tokenizer_of_the_hub(tmp_path, monkeypatch):
    """Its tokenizer.json is fetched by name and revision; end_of_text must be one of its tokens."""
    import huggingface_hub

    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_json(), encoding="utf-8")
    asked = []

    def fetch(name, filename, *, revision):
        asked.append((name, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert Tokenizer.from_hub("someone/model", "v2").encode(WORDS) == TOKENIZER.encode(WORDS)
    assert asked == [("someone/model", "tokenizer.json", "v2")]
    with pytest.raises(InputError, match=r"got '</s>'; its special tokens are <\|endoftext\|>"):
        Tokenizer.from_hub("someone/model", end_of_text="</s>")


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    """With the name, and what works without a network; as the library itself fails when it is offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hub='someone/nothing' could not be .*tokenizer\.file") as caught:
        Tokenizer.from_hub("someone/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["a", "the"])
def test_special_token_that_text_can_spell_is_refused(word):
    """Text would turn into it."""
    with pytest.raises(InputError, match=rf"special_tokens must not .*special token '{word}'"):
        train_tokenizer([WORDS * 20], 290, special_tokens=["<|user|>", word])


def test_merges_are_learned():
    """A frequent word becomes fewer tokens than it has bytes."""
    assert len(TOKENIZER.encode(" the")) == 1
    assert len(BYTES.encode(" the")) == 4


def test_empty_text_has_no_tokens():
    """Encoding adds no begin, end or space token."""
    assert TOKENIZER.encode("") == []


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f"{END_OF_TEXT}{END_OF_TEXT}\n"])
def test_text_that_spells_the_end_of_text_stays_text(text):
    """A document that contains <|endoftext|> is encoded as those letters, alone and in a batch, and comes back."""
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.end_of_text_id not in ids
    assert TOKENIZER.encode_batch([text]) == [ids]
    assert TOKENIZER.decode(ids) == text


def test_text_stays_text_after_loading(tmp_path):
    """A tokenizer read from its file treats text that spells the end of text as text, too."""
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_json(), encoding="utf-8")
    assert Tokenizer.load(path).encode(END_OF_TEXT) == TOKENIZER.encode(END_OF_TEXT)


def test_end_of_text_that_is_a_word_is_never_encoded_from_text():
    """Encoding the name of the end-of-text token does not give its id; a name for which it would is refused."""
    refusal, tokenizer = "", TOKENIZER
    try:
        tokenizer = train_tokenizer(["EOS is the EOS of EOS " * 20], 300, end_of_text="EOS")
    except InputError as error:
        refusal = str(error)
    assert "'EOS'" in refusal or tokenizer.end_of_text_id not in tokenizer.encode("EOS")


def test_end_of_text_is_spelled_out_and_counts_no_bytes():
    """The special token decodes to its name and stands for no bytes of text; every other token for at least one."""
    ids = [TOKENIZER.end_of_text_id, *TOKENIZER.encode("a")]
    assert TOKENIZER.decode(ids) == END_OF_TEXT + "a"
    n_bytes = TOKENIZER.token_bytes()
    assert n_bytes.shape == (TOKENIZER.vocab_size,)
    assert (n_bytes == 0).nonzero()[0].tolist() == [TOKENIZER.end_of_text_id]


def test_token_bytes_of_a_byte_vocabulary_are_one():
    """Without merges every token but the special one is one byte."""
    assert BYTES.vocab_size == 257
    assert sorted(BYTES.token_bytes()) == [0] + [1] * 256


def test_little_text_gives_a_smaller_vocabulary():
    """Where the text has too few merges the vocabulary is smaller than asked, and says so by its size."""
    assert 257 < train_tokenizer(["ab ab ab"], 4096).vocab_size < 270
    assert TOKENIZER.vocab_size == 290


def test_training_is_deterministic():
    """The same text gives the same tokenizer."""
    assert train_tokenizer([WORDS * 20], 290).to_json() == TOKENIZER.to_json()


@law
@given(st.text())
def test_decode_stream_gives_the_same_text(text):
    """Text decoded as ids arrive is the text decoded at once, with characters split over several tokens."""
    for tokenizer in (TOKENIZER, BYTES):
        pieces = list(tokenizer.decode_stream(tokenizer.encode(text)))
        assert "".join(pieces) == text


@law
@given(st.lists(st.integers(0, 289), max_size=16))
def test_decode_stream_of_any_ids_loses_nothing(ids):
    """Ids that are not valid UTF-8, as an untrained model writes them, stream to the text that decode gives."""
    assert "".join(TOKENIZER.decode_stream(ids)) == TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    "text", ["\ufffd" * 10, "a" + "\ufffd" * 40 + "b", "\ufffd" * 5 + "\U0001f600"], ids=["10", "40", "5 and more"]
)
def test_decode_stream_keeps_long_runs_of_the_replacement_character(text):
    """U+FFFD in the text itself is a character like any other, however many follow each other."""
    assert "".join(BYTES.decode_stream(BYTES.encode(text))) == text


def test_decode_stream_keeps_a_character_that_follows_many_stray_bytes():
    """A whole character after a run of invalid bytes arrives whole."""
    stray = BYTES.encode("\u00e9")[1:] * 16
    ids = stray + BYTES.encode("\u20ac")
    assert "".join(BYTES.decode_stream(ids)) == BYTES.decode(ids)


def test_decode_stream_holds_back_only_incomplete_characters():
    """Each piece comes as soon as its characters are whole: one for each letter, one for the three bytes of a euro."""
    assert list(BYTES.decode_stream(BYTES.encode("ab\u20acc"))) == ["a", "b", "\u20ac", "c"]
    assert list(BYTES.decode_stream(BYTES.encode("a\u20ac")[:-1])) == ["a", "\ufffd"]


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer whose decoder drops the first word's space, as SentencePiece's does."""
    vocabulary = {"<s>": 0, "\u2581hello": 1, "\u2581w\u00f6rld": 2, "<unk>": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<s>", "<unk>"])
    return Tokenizer(backend, "<s>")


def test_decode_stream_keeps_the_spaces_of_a_sentencepiece_tokenizer():
    """A tokenizer that was given as a file may mark words instead of bytes; its spaces stream, too."""
    tokenizer = word_tokenizer()
    ids = tokenizer.encode("hello w\u00f6rld hello")
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids) == "hello w\u00f6rld hello"


def test_token_bytes_of_a_sentencepiece_tokenizer_count_utf8():
    """Outside byte-level tokenizers a token counts its UTF-8 bytes, the word mark as one space."""
    assert word_tokenizer().token_bytes().tolist() == [0, 6, 7, 0]


def test_pre_tokenizer_is_exactly_gpt2s_byte_level():
    """The saved file has GPT-2's pipeline: byte level, no normaliser, no prefix space, nothing added, all 256 bytes."""
    saved = json.loads(TOKENIZER.to_json())
    assert saved["pre_tokenizer"]["type"] == saved["decoder"]["type"] == "ByteLevel"
    assert saved["pre_tokenizer"]["add_prefix_space"] is False
    assert saved["pre_tokenizer"]["use_regex"] is True
    assert [saved[key] for key in ("normalizer", "post_processor", "truncation", "padding")] == [None] * 4
    assert saved["model"]["type"] == "BPE"
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(saved["model"]["vocab"])
    assert [token["content"] for token in saved["added_tokens"] if token["special"]] == [END_OF_TEXT]


def test_pre_tokenizer_splits_as_gpt2_does():
    """Words keep one leading space, other spaces, digits and contractions split as GPT-2 splits them."""
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("Hi  dog's 12\u00e9!\n")]
    assert pieces == ["Hi", "\u0120", "\u0120dog", "'s", "\u012012", "\u00c3\u00a9", "!", "\u010a"]


def test_missing_tokenizer_file_names_the_path(tmp_path):
    """A path without a file is answered with the path and what would have been accepted."""
    with pytest.raises(FileNotFoundError, match=r"none\.json.*tokenizer\.json"):
        Tokenizer.load(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe", b'{"version": "1.0", "model": {}}'])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    """A file that holds something else is an error with its path."""
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"wrong\.json is not a tokenizer\.json"):
        Tokenizer.load(path)


def test_end_of_text_that_the_tokenizer_lacks_is_refused(tmp_path):
    """An end-of-text token that is not in the file is an error with the key and the value."""
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_json(), encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.tokenizer\.end_of_text .*got '</s>'"):
        Tokenizer.load(path, "</s>")


@pytest.mark.parametrize("is_unknown", [True, False])
def test_end_of_text_that_text_gives_is_refused(is_unknown):
    """Also where it is no special token, or what unknown words become."""
    vocabulary = {"</s>": 0, "a": 1, "<unk>": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="</s>" if is_unknown else "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match="'</s>' of text that only spells it"):
        Tokenizer(backend, "</s>")


def test_dropout_of_merges_is_switched_off():
    """It is for training; the same text must give the same ids."""
    spec = json.loads(TOKENIZER.to_json())
    spec["model"]["dropout"] = 0.9
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    assert tokenizer.encode(WORDS * 20) == TOKENIZER.encode(WORDS * 20)


@pytest.mark.parametrize(
    ("index", "message"),
    [(2**31 - 1, "ids below 10,000,000, got 2147483647"), (9_999_999, r"its \d+ tokens .*, got id 9999999")],
)
def test_a_token_with_an_absurd_id_is_refused(index, message, tmp_path):
    """A table of all ids up to it would take 16 GiB; a small gap is fine."""
    values = json.loads(train_tokenizer(["some words " * 9], 300).to_json())
    values["model"]["vocab"] |= {"zz": 2000}
    for number, name in ((300, "fine"), (index, "absurd")):
        values["model"]["vocab"]["zz"] = number
        (tmp_path / name).write_text(json.dumps(values))
    assert Tokenizer.load(tmp_path / "fine").vocab_size == 301
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path / "absurd")


def _unigram(*given_to_the_trainer: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", *given_to_the_trainer]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(["some words, and others <|>: end of text " * 9], trainer)
    return backend


def test_advice_on_a_token_that_text_gives_can_be_followed(tmp_path):
    """A Unigram trainer makes pieces of its special tokens, which text then gives; added later, they are none."""
    with pytest.raises(InputError, match="without it among the special_tokens of its trainer, .* add_special_tokens"):
        Tokenizer(_unigram(END_OF_TEXT))
    backend = _unigram()
    backend.add_special_tokens([END_OF_TEXT])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.end_of_text_id == tokenizer.vocab_size - 1
    assert tokenizer.end_of_text_id not in tokenizer.encode(f"words {END_OF_TEXT} others{END_OF_TEXT}")
