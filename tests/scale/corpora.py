"""Small corpora and configs for tests of preparation at scale."""

from __future__ import annotations

import json
import random
from pathlib import Path

from moe_gpt.config import DataConfig, SourceConfig, TokenizerConfig

_TEXT = "the quick brown fox jumps over a lazy dog while seven wizards with quiet boxes wait for rain and of be that"
_WORDS = _TEXT.split()


def sentences(n: int, seed: int) -> str:
    """Return n random sentences of ten words, a line for each."""
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(_WORDS, k=10)).capitalize() + "." for _ in range(n))


def write_lines(path: Path, texts: list[str]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_corpus(folder: Path) -> tuple[SourceConfig, ...]:
    """Write several files of several formats, with empty and repeated documents; return two sources."""
    texts = [sentences(1 + n % 4, n) for n in range(60)]
    write_lines(folder / "lines" / "a.jsonl", [*texts[:25], "", texts[3], texts[3]])
    write_lines(folder / "lines" / "b.jsonl", [*texts[25:], "", texts[7]])
    (folder / "lines" / "c.csv").write_text("text\n" + "".join(f"row {n} of a table\n" for n in range(20)))
    (folder / "book.txt").write_text(sentences(30, 99))
    return (
        SourceConfig(name="lines", files=str(folder / "lines" / "*"), deduplicate=True),
        SourceConfig(name="book", files=str(folder / "book.txt")),
    )


def config_of(sources: tuple[SourceConfig, ...], cache: Path, **keys) -> DataConfig:
    """Return a config with a small vocabulary."""
    values = {"validation_fraction": 0.1, **keys}
    return DataConfig(tokenizer=TokenizerConfig(vocab_size=280), sources=sources, cache_dir=str(cache), **values)


def stores(cache: Path) -> dict[str, bytes]:
    """Return the bytes of all files of the stores in a cache."""
    folder = cache / "tokens"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
