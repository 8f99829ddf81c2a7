"""From a data config to a tokenizer and one token store per source, built on first use and cached."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from moe_gpt.config import DataConfig, SourceConfig
from moe_gpt.data.corpus import ReadingProgress, describe_origin, iterate_documents
from moe_gpt.data.document import is_held_out
from moe_gpt.data.encode import Encoder, encode_documents, refuse_in_starting_process
from moe_gpt.data.read_back import first_of, what_is_lost
from moe_gpt.data.token_store import FORMAT_VERSION, SPLITS, TokenStore, build_store, verify_store
from moe_gpt.data.tokenizer import Tokenizer, train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.durable import delete_leftovers, read_digest, replace_file
from moe_gpt.terminal.progress import ProgressBar

_TOKENIZER_SAMPLE_BYTES = 20_000_000
"""Text at the start of each source that the tokenizer is trained on."""


class PreparedSource(NamedTuple):
    """A source and its tokens."""

    config: SourceConfig
    train: TokenStore
    validation: TokenStore


class PreparedData(NamedTuple):
    """The tokenizer and all tokens of a run."""

    tokenizer: Tokenizer
    sources: tuple[PreparedSource, ...]

    @property
    def fingerprint(self) -> dict[str, str]:
        """The digest of each source's tokens."""
        return {source.config.name: source.train.digest for source in self.sources}


def default_cache_dir() -> Path:
    """Return moe_gpt's folder in the user's cache (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_gpt"


def prepare_data(
    config: DataConfig, tokenizer: Tokenizer | None = None, say: Callable[[str], None] = print
) -> PreparedData:
    """Return the tokenizer and the tokens of all sources, and build those that are not in the cache.

    Args:
        tokenizer: use this one instead of the config's, as a resumed run does.
        say: shows what is being built, and a vocabulary that came out smaller than asked.

    Raises:
        InputError: naming the source or setting that cannot be used.
        OSError: if the cache cannot be written.
    """
    refuse_in_starting_process()
    with usable_cache(config) as cache:
        tokenizer = tokenizer or obtain_tokenizer(config, cache, say)
        sources = tuple(_obtain_source(source, config, tokenizer, cache, say) for source in config.sources)
    return PreparedData(tokenizer, sources)


@contextlib.contextmanager
def usable_cache(config: DataConfig) -> Iterator[Path]:
    """Give the folder that keeps tokenised data, and turn errors of its files into ``InputError``."""
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    try:
        yield cache
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"data.cache_dir={cache} or a file of a source cannot be used: {error}") from error


def obtain_tokenizer(config: DataConfig, cache: Path, say: Callable[[str], None]) -> Tokenizer:
    """Return the tokenizer of a config, and train it if it is not in the cache.

    It is trained on text that no filter has seen.
    """
    wanted = config.tokenizer
    if wanted.file:
        return Tokenizer.load(wanted.file, wanted.end_of_text)
    if wanted.hub:
        return Tokenizer.from_hub(wanted.hub, wanted.revision, wanted.end_of_text)
    key = _fingerprint(
        [describe_origin(source) for source in config.sources],
        wanted.vocab_size,
        wanted.end_of_text,
        wanted.special_tokens,
        config.validation_fraction,
        _TOKENIZER_SAMPLE_BYTES,
    )
    path = cache / "tokenizers" / f"{key}.json"
    digest = path.with_suffix(".sha256")
    build = functools.partial(_train_tokenizer, config, path, say)
    build_once([path, digest], "training the same tokenizer", say, build)
    if read_digest(path).sha256 != digest.read_text(encoding="utf-8"):
        raise InputError(f"{path} has changed since it was trained (another SHA-256); delete it to train it again")
    tokenizer = Tokenizer.load(path, wanted.end_of_text)
    if tokenizer.vocab_size < wanted.vocab_size:
        say(
            f"the text gives a vocabulary of {tokenizer.vocab_size} tokens, "
            f"fewer than data.tokenizer.vocab_size={wanted.vocab_size}"
        )
    return tokenizer


def build_once(parts: Sequence[Path], what: str, say: Callable[[str], None], build: Callable[[], None]) -> None:
    """Build a file or folder of the cache unless all its parts exist; other processes wait for the one that builds."""
    path = parts[0]
    if all(part.exists() for part in parts):
        return
    with _lock(path.parents[1] / "locks" / f"{path.stem}.lock", what, say):
        if not all(part.exists() for part in parts):  # another process may have built it meanwhile
            delete_leftovers(path.parent, path.stem)
            build()


def _train_tokenizer(config: DataConfig, path: Path, say: Callable[[str], None]) -> None:
    """Write a tokenizer and then its digest, which marks it as complete."""
    wanted = config.tokenizer
    say(f"training a tokenizer of {wanted.vocab_size} tokens on {', '.join(source.name for source in config.sources)}")
    with _interruptible():
        texts = itertools.chain.from_iterable(_sample(source, config.validation_fraction) for source in config.sources)
        tokenizer = train_tokenizer(texts, wanted.vocab_size, wanted.end_of_text, wanted.special_tokens)
    replace_file(path, tokenizer.to_json())
    replace_file(path.with_suffix(".sha256"), read_digest(path).sha256)


def _sample(source: SourceConfig, validation_fraction: float) -> Iterator[str]:
    """Yield the first texts of a source without held-out ones; of a single book, which is split later, all of it."""
    n_chars, held_out = 0, ""
    for document in iterate_documents(source):
        if is_held_out(document, validation_fraction):
            held_out = held_out or document.text
            continue
        yield document.text
        n_chars += len(document.text)
        if n_chars >= _TOKENIZER_SAMPLE_BYTES:
            return
    if not n_chars:
        if not held_out:
            raise InputError(f"source {source.name} has no documents with text; add text, or remove the source")
        yield held_out


def store_folder(source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, cache: Path) -> Path:
    """Return the folder of a source's tokens, whose name follows from everything that decides which tokens they are."""
    fim = (source.fim_rate, source.fim_spm_rate) if source.fim_rate else None
    key = _fingerprint(
        describe_origin(source),
        tokenizer.to_json(),
        tokenizer.end_of_text,
        config.validation_fraction,
        fim,
        *config.cleaning,
    )
    return cache / "tokens" / f"{source.name}-{key}"


def _obtain_source(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, cache: Path, say: Callable[[str], None]
) -> PreparedSource:
    folder = store_folder(source, config, tokenizer, cache)
    build = functools.partial(_tokenise, source, config, tokenizer, folder, say)
    build_once([folder], f"tokenising {source.name}", say, build)
    verify_store(folder)
    train, validation = (TokenStore(folder, split, check=config.verify_tokens) for split in SPLITS)
    if train.lost:
        say(f"WARNING: {train.lost}")
    return PreparedSource(source, train, validation)


def _tokenise(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, folder: Path, say: Callable[[str], None]
) -> None:
    if config.cleaning:
        raise InputError(
            f"source {source.name} is not prepared yet, and data.filters and data.near_duplicates.remove need "
            "datatrove; run moe-gpt prepare with this config and --engine local first"
        )
    say(f"tokenising {source.name}")
    encoder = Encoder(tokenizer, config.validation_fraction, source.fim_rate, source.fim_spm_rate)
    reading = ReadingProgress()
    first, documents = first_of(iterate_documents(source, reading), lambda document: len(document.text))
    with (
        contextlib.closing(encode_documents(documents, encoder, config.processes, say)) as encoded,
        contextlib.closing(ProgressBar(source.name, say=say)) as bar,
    ):
        report = functools.partial(_report, bar, source, reading)
        lost = what_is_lost((document.text for document in first), tokenizer, source.name)
        build_store(
            source.name, encoded, tokenizer, folder, config.validation_fraction, source.max_tokens, report, lost
        )


def _report(bar: ProgressBar, source: SourceConfig, reading: ReadingProgress, n_documents: int, n_tokens: int) -> None:
    """Show the documents and tokens so far, and the time left if it is known."""
    fraction = max(reading.fraction or 0.0, n_tokens / source.max_tokens if source.max_tokens else 0.0)
    left = bar.time_left(fraction)
    still = f", about {left} left" if left is not None else ""
    line = f"tokenising {source.name}: {n_documents:,} documents, {n_tokens:,} tokens{still}"
    bar.update(
        n_tokens, f"{n_documents:,} documents{still}", line, total=round(n_tokens / fraction) if fraction else None
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT end the process at once, because Python cannot handle it inside the tokenizer library."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _lock(lock_file: Path, what: str, say: Callable[[str], None]) -> contextlib.AbstractContextManager:
    """Wait for the lock and hold it. A process that dies frees its lock."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(lock_file)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"waiting for another process that is {what}")
        return lock.acquire()


def _fingerprint(*parts: Any) -> str:
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]
