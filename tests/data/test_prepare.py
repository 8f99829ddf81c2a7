"""Tokenizer and token stores: built on first use, found again, and noticed when the text changed."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import pytest
import tokenizers

from moe_gpt.config import DataConfig, SourceConfig, TokenizerConfig
from moe_gpt.data import prepare
from moe_gpt.data.document import Document, is_held_out
from moe_gpt.data.prepare import default_cache_dir, prepare_data
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError

FRACTION = 0.3


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Work in a folder of one's own, away from the user's caches."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hugging_face")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    monkeypatch.chdir(tmp_path)


def write_texts(*names: str, word: str = "tree") -> None:
    """Write some small documents, each its own file, with words of their own."""
    for name in names:
        Path(name).mkdir(exist_ok=True)
        for i in range(12):
            Path(name, f"{i}.txt").write_text(f"{name} {i}: the {word} and the {word}s there\n" * 3, encoding="utf-8")


def config_of(*names: str, vocab_size: int = 270, **keys) -> DataConfig:
    """Return a config whose sources are the folders of that name."""
    sources = tuple(SourceConfig(name=name, files=f"{name}/*.txt") for name in names)
    values = {"cache_dir": "cache", "validation_fraction": FRACTION, **keys}
    return DataConfig(tokenizer=TokenizerConfig(vocab_size=vocab_size), sources=sources, **values)


def with_source(config: DataConfig, source: SourceConfig) -> DataConfig:
    """Return the config with this source as its only one."""
    return dataclasses.replace(config, sources=(source,))


def refuse(*_):
    """Stand in for reading documents where none may be read."""
    raise AssertionError("documents were read again")


def test_first_use_builds_and_says_so():
    """The first call trains the tokenizer and tokenises every source, and says which."""
    write_texts("prose", "code")
    said = []
    data = prepare_data(config_of("prose", "code"), say=said.append)
    assert said == ["training a tokenizer of 270 tokens on prose, code", "tokenising prose", "tokenising code"]
    assert [source.config.name for source in data.sources] == ["prose", "code"]
    assert data.tokenizer.vocab_size == 270
    assert all(len(source.train) > 100 < len(source.train) + len(source.validation) for source in data.sources)


def test_second_use_reads_no_document(monkeypatch):
    """A second call finds tokenizer and tokens in the cache: it reads no document and says nothing."""
    write_texts("prose", "code")
    first = prepare_data(config_of("prose", "code"), say=lambda _: None)
    monkeypatch.setattr(prepare, "iterate_documents", refuse)
    said = []
    second = prepare_data(config_of("prose", "code"), say=said.append)
    assert said == []
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer.to_json() == first.tokenizer.to_json()


def test_fingerprint_names_each_source_and_follows_its_tokens():
    """The fingerprint has one digest for each source, of that source's tokens."""
    write_texts("prose", "code")
    data = prepare_data(config_of("prose", "code"), say=lambda _: None)
    assert data.fingerprint == {source.config.name: source.validation.digest for source in data.sources}
    assert len(set(data.fingerprint.values())) == 2


def test_stores_hold_the_sources_texts():
    """Decoding both splits of a source gives its files' texts, each ended by end-of-text."""
    write_texts("prose")
    data = prepare_data(config_of("prose"), say=lambda _: None)
    (source,) = data.sources
    ids = [*source.train.tokens[:].tolist(), *source.validation.tokens[:].tolist()]
    found = data.tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    assert sorted(found) == sorted(path.read_text(encoding="utf-8") for path in Path("prose").iterdir())


def test_changed_file_is_noticed():
    """A file that changed since gives new tokens, not the old ones from the cache."""
    write_texts("prose")
    first = prepare_data(config_of("prose"), say=lambda _: None)
    Path("prose/3.txt").write_text("something else altogether\n", encoding="utf-8")
    assert prepare_data(config_of("prose"), say=lambda _: None).fingerprint != first.fingerprint


def test_added_file_is_noticed():
    """A file that a glob newly matches is read."""
    write_texts("prose")
    first = prepare_data(config_of("prose"), say=lambda _: None)
    Path("prose/new.txt").write_text("one more document\n", encoding="utf-8")
    assert prepare_data(config_of("prose"), say=lambda _: None).fingerprint != first.fingerprint


def test_tokenizer_follows_the_text():
    """Other sources in the same cache get a tokenizer trained on their own text."""
    write_texts("prose", word="tree")
    write_texts("code", word="lambda")
    prose, code = (
        prepare_data(config_of(name, vocab_size=290), say=lambda _: None).tokenizer for name in ("prose", "code")
    )
    assert len(prose.encode(" tree")) < len(code.encode(" tree"))
    assert len(code.encode(" lambda")) < len(prose.encode(" lambda"))


def test_changed_file_of_a_local_dataset_is_noticed():
    """A local dataset folder whose file changed gives new tokens as well."""
    source = SourceConfig(name="mine", dataset=str(Path.cwd() / "folder"))
    config = with_source(config_of("unused", vocab_size=257), source)
    Path("folder").mkdir()
    digests = set()
    for words in ("first version of it", "second version of it, and longer"):
        Path("folder/train.jsonl").write_text(f'{{"text": "{words}"}}\n' * 9, encoding="utf-8")
        digests.add(prepare_data(config, say=lambda _: None).fingerprint["mine"])
    assert len(digests) == 2


def test_same_text_with_another_time_gives_the_same_fingerprint():
    """A file that was only touched is read again; the run's fingerprint, which is of the tokens, does not change."""
    write_texts("prose")
    first = prepare_data(config_of("prose"), say=lambda _: None)
    os.utime("prose/3.txt", ns=(1, 1))
    said = []
    assert prepare_data(config_of("prose"), say=said.append).fingerprint == first.fingerprint
    assert "tokenising prose" in said


@pytest.mark.parametrize("keys", [{"validation_fraction": 0.5}, {"vocab_size": 265}, {"max_tokens": 200}])
def test_other_settings_do_not_find_the_store(keys):
    """A setting that changes the tokens or their split is not served from another setting's cache."""
    write_texts("prose")
    first = prepare_data(config_of("prose"), say=lambda _: None)
    max_tokens = keys.pop("max_tokens", None)
    config = config_of("prose", **keys)
    source = SourceConfig(name="prose", files="prose/*.txt", max_tokens=max_tokens)
    second = prepare_data(with_source(config, source), say=lambda _: None)
    assert second.fingerprint != first.fingerprint


def test_settings_of_the_mixture_share_one_store(monkeypatch):
    """Epochs and prompts change no token, so runs that differ in them share the tokenised data."""
    write_texts("prose")
    config = config_of("prose")
    prepare_data(config, say=lambda _: None)
    monkeypatch.setattr(prepare, "iterate_documents", refuse)
    source = SourceConfig(name="prose", files="prose/*.txt", epochs=7, prompt="x")
    data = prepare_data(with_source(config, source), say=lambda _: None)
    assert data.sources[0].config.epochs == 7


def test_smaller_vocabulary_is_said_with_both_sizes():
    """Text too small for the vocabulary gives a smaller one and a notice with both sizes, at every use."""
    write_texts("prose")
    for _ in range(2):
        said = []
        data = prepare_data(config_of("prose", vocab_size=5000), say=said.append)
        assert data.tokenizer.vocab_size < 500
        assert said[-1 if len(said) == 1 else 1] == (
            f"the text gives a vocabulary of {data.tokenizer.vocab_size} tokens, "
            "fewer than data.tokenizer.vocab_size=5000"
        )


def test_tokenizer_learns_nothing_from_held_out_documents():
    """Text that is held out for validation gives no merges."""
    texts = [f"{'qzqz' * 50}{i}" for i in range(50)]
    held_out = [text for text in texts if is_held_out(Document(text, text), FRACTION)]
    Path("mine").mkdir()
    for i, text in enumerate([*held_out, "the other text " * 20 + "1", "the other text " * 20 + "2"]):
        Path(f"mine/{i}.txt").write_text(text, encoding="utf-8")
    tokenizer = prepare_data(config_of("mine"), say=lambda _: None).tokenizer
    assert len(held_out) > 5
    assert len(tokenizer.encode("qz")) == 2
    assert len(tokenizer.encode(" text")) == 1


@pytest.mark.parametrize("is_validation", [False, True])
def test_tokenizer_learns_from_a_single_document_whatever_its_hash(is_validation):
    """A single book is mostly training text, so the tokenizer learns from it, whichever side its hash says."""
    candidates = (f"{i} " + "the tree and the trees there, some more words to merge " * 50 for i in range(99))
    book = next(text for text in candidates if is_held_out(Document(text, text), FRACTION) == is_validation)
    Path("mine").mkdir()
    Path("mine/book.txt").write_text(book, encoding="utf-8")
    assert prepare_data(config_of("mine"), say=lambda _: None).tokenizer.vocab_size == 270


def test_given_tokenizer_is_used():
    """A tokenizer that is passed in, as a continued run does, takes the place of the config's."""
    write_texts("prose")
    tokenizer, said = train_tokenizer([], 257), []
    data = prepare_data(config_of("prose"), tokenizer, said.append)
    assert data.tokenizer is tokenizer
    assert said == ["tokenising prose"]


def test_tokenizer_file_is_used():
    """data.tokenizer.file is loaded instead of training, and its size need not be vocab_size."""
    write_texts("prose")
    Path("own.json").write_text(train_tokenizer([], 257).to_json(), encoding="utf-8")
    config = dataclasses.replace(config_of("prose"), tokenizer=TokenizerConfig(file="own.json"))
    said = []
    assert prepare_data(config, say=said.append).tokenizer.vocab_size == 257
    assert said == ["tokenising prose"]


def test_cache_is_in_the_users_cache_folder_unless_given(monkeypatch):
    """Without cache_dir the data goes to moe_gpt in XDG_CACHE_HOME, or in ~/.cache; with it nothing else is written."""
    write_texts("prose")
    prepare_data(config_of("prose", cache_dir="given"), say=lambda _: None)
    assert not default_cache_dir().exists()
    prepare_data(config_of("prose", cache_dir=None), say=lambda _: None)
    assert default_cache_dir() == Path.cwd() / "user_cache" / "moe_gpt"
    assert {path.name for path in default_cache_dir().iterdir()} == {"locks", "tokenizers", "tokens"}
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache_dir() == Path("/home/somebody/.cache/moe_gpt")


def test_source_that_fails_leaves_no_store():
    """A source that cannot be read is an error with its name, and the next call does not find half of it."""
    write_texts("prose")
    Path("prose/z.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="source prose: .*z.txt.* byte 0xe9 at position 3"):
        prepare_data(config_of("prose"), train_tokenizer([], 257), lambda _: None)
    assert list(Path("cache").glob("tokens/*")) == []


def test_two_processes_do_not_tokenise_the_same_source_twice(monkeypatch):
    """The second waits, says so, and finds what the first made; what a dead process left is cleared away."""
    builds, said, lock = [], [], threading.Lock()
    entered, may_finish = threading.Event(), threading.Event()
    real = prepare.build_store

    def slow(name, *arguments):
        with lock:
            builds.append(name)
        entered.set()
        assert may_finish.wait(20)
        real(name, *arguments)

    monkeypatch.setattr(prepare, "build_store", slow)
    leftover = Path("cache/tokens")
    write_texts("prose")
    config = config_of("prose")
    first = threading.Thread(target=prepare_data, args=(config,), kwargs={"say": lambda text: None})
    first.start()
    assert entered.wait(20)
    (leftover / "of-another-source.tmp-x").mkdir(parents=True)

    def say(text):
        said.append(text)
        if "waiting" in text:
            may_finish.set()

    prepare_data(config, say=say)
    first.join()
    assert len(builds) == len(config.sources)
    assert any(text.startswith("waiting for another process that is tokenising") for text in said)
    assert (leftover / "of-another-source.tmp-x").exists()  # somebody else's


def test_damaged_tokens_are_not_used():
    """A flipped bit in the cache is found when it is read; without the check, a cut is."""
    write_texts("prose")
    config = config_of("prose")
    prepare_data(config, say=lambda text: None)
    (path,) = Path("cache/tokens").glob("prose-*/train.bin")
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    damaged = prepare_data(config, say=lambda text: None)
    with pytest.raises(InputError, match="their SHA-256 differs"):
        damaged.sources[0].train.tokens[:100]
    unchecked = dataclasses.replace(config, verify_tokens=False)
    prepare_data(unchecked, say=lambda text: None)
    path.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"train\.bin has [\d,]+ bytes, .* written with [\d,]+ bytes"):
        prepare_data(unchecked, say=lambda text: None)


def test_changed_tokenizer_in_the_cache_is_not_used():
    """A tokenizer that works but is not the one that was trained."""
    write_texts("prose")
    prepare_data(config_of("prose"), say=lambda text: None)
    (path,) = Path("cache/tokenizers").glob("*.json")
    path.write_text(path.read_text().replace('"<|endoftext|>"', '"<|endoftext|>" '))
    with pytest.raises(InputError, match=f"{path} has changed since it was trained.*delete it"):
        prepare_data(config_of("prose"), say=lambda text: None)
    path.unlink()
    prepare_data(config_of("prose"), say=lambda text: None)


def lossy_tokenizer(normalise: bool) -> str:
    """Write a tokenizer that lacks tokens for most bytes, or one that makes text lower case; return its path."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if normalise else list("abcdeĠ")
    backend.normalizer = tokenizers.normalizers.Lowercase() if normalise else None
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet), show_progress=False,
        limit_alphabet=len(alphabet),
    )  # fmt: skip
    backend.train_from_iterator(["a bad bed"], trainer)
    backend.save("lossy.json")
    return "lossy.json"


@pytest.mark.parametrize("normalise", [True, False])
def test_tokenizer_that_loses_text_is_warned_of_every_time(normalise):
    """What is lost is shown; bytes are those of the text, also where the data is found in the cache."""
    Path("t").mkdir()
    for number in range(40):
        Path(f"t/{number}.txt").write_text(f"Bad É bed {number}", encoding="utf-8")
    n_bytes = sum(len(path.read_bytes()) for path in Path("t").iterdir())
    config = DataConfig(
        tokenizer=TokenizerConfig(file=lossy_tokenizer(normalise)),
        sources=(SourceConfig(name="t", files="t/*.txt"),),
        cache_dir="cache",
        validation_fraction=0.3,
    )
    for _ in range(2):
        said: list[str] = []
        (source,) = prepare_data(config, say=said.append).sources
        (warning,) = [text for text in said if text.startswith("WARNING")]
        assert "loses text of t: 40 of the first 40 documents" in warning
        assert source.train.n_bytes + source.validation.n_bytes == n_bytes
        assert (source.train.bytes_per_token_byte == 1) is normalise
