"""Reading documents from the built-in corpus, local files or the Hugging Face hub.

``local_files`` reads files, and the library ``datasets`` reads datasets of the hub and folders. Documents come in a
fixed order; nothing is shuffled here.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import os
import platform
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_gpt.config import SourceConfig
from moe_gpt.data.builtin_corpus import iterate_builtin, source_files
from moe_gpt.data.compressed import UnreadableFileError, first_undecodable, is_compressed
from moe_gpt.data.disguises import format_of
from moe_gpt.data.document import Document, is_in_part
from moe_gpt.data.folders import check_folder, saved_split
from moe_gpt.data.local_files import Row, read_rows
from moe_gpt.data.package_corpus import iterate_packages, package_files, versions_of
from moe_gpt.errors import InputError, shown

_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclasses.dataclass
class ReadingProgress:
    """The approximate share of a source that has been read, from 0 to 1; None if it is unknown."""

    fraction: float | None = None


def iterate_documents(source: SourceConfig, progress: ReadingProgress | None = None) -> Iterator[Document]:
    """Yield at most ``max_documents`` documents of a source that have ``min_chars`` and are in its ``part``.

    ``deduplicate`` yields each text once and keeps 16 bytes of digest for every document.

    Args:
        progress: kept up to date while reading.

    Raises:
        InputError: naming the source and its problem: no files, no such column, bytes that are not UTF-8, a hub that
            cannot be reached.
    """
    progress = progress or ReadingProgress()
    documents = _all_documents(source, progress)
    documents = (document for document in documents if is_wanted(document, source))
    if source.deduplicate:
        documents = _without_repeats(documents)
    yield from _counted(documents, source.max_documents, progress) if source.max_documents else documents


def is_wanted(document: Document, source: SourceConfig) -> bool:
    """Whether a document has the source's ``min_chars`` and is in its ``part``."""
    return len(document.text) >= source.min_chars and is_in_part(document, source.part)


def _counted(documents: Iterator[Document], limit: int, progress: ReadingProgress) -> Iterator[Document]:
    for index, document in enumerate(itertools.islice(documents, limit)):
        progress.fraction = max(progress.fraction or 0.0, index / limit)
        yield document


def _all_documents(source: SourceConfig, progress: ReadingProgress) -> Iterator[Document]:
    if source.builtin == "packages":
        return iterate_packages(source.packages)
    if source.builtin:
        return iterate_builtin(source.builtin)
    texts = texts_of_dataset(source, progress) if source.dataset else _files_texts(source, progress)
    return (Document(text, text) for text in texts)


def _without_repeats(documents: Iterator[Document]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            yield document


_ORIGIN = (
    "builtin", "files", "format", "dataset", "subset", "split", "revision", "text_field", "template", "errors",
    "min_chars", "part", "deduplicate", "max_documents", "max_tokens",
)  # fmt: skip


def describe_origin(source: SourceConfig) -> dict[str, Any]:
    """Return what identifies a source's text without reading it: settings, and the sizes and times of files."""
    origin: dict[str, Any] = {key: getattr(source, key) for key in _ORIGIN}
    origin["python"] = platform.python_version() if source.builtin else None
    if source.builtin == "packages":
        origin["packages"] = versions_of(source.packages)
    origin["stat"] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _local_files(source)]
    return origin


def _local_files(source: SourceConfig) -> list[Path]:
    if source.builtin == "packages":
        return [path for _, path in package_files(source.packages)]
    if source.builtin:
        return source_files()
    if source.files:
        return expand_files(source)
    found = Path(str(source.dataset)).rglob("*")  # none unless the dataset is a local folder
    return sorted(path.resolve() for path in found if path.is_file())


def expand_files(source: SourceConfig) -> list[Path]:
    """Return the files that the source's paths and globs match, sorted, each once, with the names that links give."""
    patterns = source.files if isinstance(source.files, tuple) else (str(source.files),)
    paths = sorted(set().union(*(_matches(source.name, pattern) for pattern in patterns)), reverse=True)
    return sorted({path.resolve(): path for path in paths}.values())


def _matches(name: str, pattern: str) -> set[Path]:
    path = Path(os.path.expanduser(pattern))
    found = [] if path.is_dir() else _expand(Path(path.anchor), path.relative_to(path.anchor).parts)
    found = [path] if path.is_file() else found
    files = {match.parent.resolve() / match.name for match in found if os.path.isfile(match)}
    if not files:
        inside = f"for a folder, write '{pattern}/*.txt' or '{pattern}/*.jsonl'"
        remedy = inside if path.is_dir() else f"the current folder is {Path.cwd()}"
        if (path / "dataset_info.json").is_file():
            remedy = f"it was made by save_to_disk, so write dataset: {pattern}"
        raise InputError(f"source {name}: files={pattern!r} matches no file; {remedy}")
    return files


def _expand(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Yield what the parts of a glob match below a folder; ``**`` visits each folder once, so loops of links end."""
    if "**" not in parts:
        matches = glob.glob(os.path.join(*parts) if parts else "*", root_dir=folder)
        yield from (folder / match for match in matches)
        return
    at = parts.index("**")
    starts = _expand(folder, parts[:at]) if at else [folder]
    for start in filter(os.path.isdir, starts):
        for inner in _folders_below(start, set()):
            yield from _expand(inner, parts[at + 1 :])


def _folders_below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield folder
    with os.scandir(folder) as entries:
        inner = sorted(entry.name for entry in entries if entry.name[0] != "." and os.path.isdir(entry.path))
    for name in inner:
        yield from _folders_below(folder / name, seen)


def _files_texts(source: SourceConfig, progress: ReadingProgress) -> Iterator[str]:
    paths = expand_files(source)
    sizes = [path.stat().st_size for path in paths]
    n_bytes, n_finished, n_chars = sum(sizes), 0, 0
    bytes_per_char = 1 / 3 if is_compressed(paths[0]) else 1.0
    for path, size in zip(paths, sizes, strict=True):
        n_chars_before = n_chars
        for text in texts_of_file(source, path):
            yield text
            n_chars += len(text)
            read = min(size, (n_chars - n_chars_before) * bytes_per_char)
            progress.fraction = (n_finished + read) / n_bytes
        n_finished += size
        bytes_per_char = n_finished / n_chars if n_chars else bytes_per_char


def texts_of_dataset(
    source: SourceConfig, progress: ReadingProgress | None = None, part: int = 0, n_parts: int = 1
) -> Iterator[str]:
    """Yield the texts of a dataset, or of one of ``n_parts`` parts that together are the whole, in order.

    A streamed dataset has at most as many parts as files; the others are empty.
    """
    progress, dataset, where = progress or ReadingProgress(), open_dataset(source), f"dataset {source.dataset}"
    if n_parts > 1:
        n_parts = min(n_parts, getattr(dataset, "num_shards", n_parts))
        if part >= n_parts:
            return
        dataset, where = dataset.shard(n_parts, part, contiguous=True), f"{where}, part {part + 1} of {n_parts}"
    try:
        n_rows = len(dataset)
    except TypeError:  # a streamed one; the hub may know
        n_rows = getattr((dataset.info.splits or {}).get(source.split), "num_examples", None) or 0

    def rows() -> Iterator[Row]:
        for index, row in enumerate(dataset):
            progress.fraction = min(1.0, index / n_rows) if n_rows else None
            yield Row(f"row {index + 1}", row)

    yield from _read_texts(source, rows(), where)


def may_be_cut(source: SourceConfig, path: Path) -> bool:
    """Whether a file can be read from any of its bytes on: JSON lines that are not compressed."""
    return _kind(source, path) == "lines" and not is_compressed(path)


def _kind(source: SourceConfig, path: Path) -> str:
    """Return the format of a file; of text, the whole file is one document."""
    try:
        return source.format if source.format != "auto" else format_of(path)
    except UnreadableFileError as error:
        raise InputError(f"source {source.name}: {path}: {error}") from None


def texts_of_file(source: SourceConfig, path: Path, span: tuple[int, int] | None = None) -> Iterator[str]:
    """Yield the texts of a file of a source that are not empty.

    Args:
        span: only lines that begin at these bytes, for a file that ``may_be_cut``.
    """
    if _kind(source, path) == "text":
        source = dataclasses.replace(source, text_field="text", template=None)
    yield from _read_texts(source, read_rows(path, source.format, _columns(source), source.errors, span), str(path))


def _columns(source: SourceConfig) -> tuple[str, ...]:
    return (source.text_field,) if source.template is None else source.template_fields


def open_dataset(source: SourceConfig) -> Any:
    """Return the rows of a source's dataset, with the columns that the source reads.

    Raises:
        InputError: naming the source and the dataset, where it cannot be opened or lacks a column.
    """
    path = Path(str(source.dataset))
    if path.is_file():
        raise InputError(f"source {source.name}: dataset={source.dataset!r} is a file; write files: {source.dataset}")
    try:
        dataset = _load(source, path)
    except (UnreadableFileError, InputError) as error:
        raise InputError(f"source {source.name}: dataset={source.dataset!r} cannot be used: {error}") from None
    except Exception as error:  # datasets raises many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise InputError(
            f"source {source.name}: dataset {source.dataset} (subset {source.subset}, split {source.split}) could not "
            f"be opened: {reason}" + ("" if path.exists() else "; without a network, use files: or builtin:")
        ) from error
    if not dataset.column_names:  # those of some streams are known with the first row
        return dataset
    _check_columns(source, dataset.column_names, f"dataset {source.dataset}")
    return dataset.select_columns(list(_columns(source)))  # others need not be decoded


def _load(source: SourceConfig, path: Path) -> Any:
    import datasets

    if part := saved_split(path, source.split):
        return datasets.load_from_disk(str(part))
    if path.is_dir():
        check_folder(path, source.subset)
    return datasets.load_dataset(
        source.dataset, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
    )


def _read_texts(source: SourceConfig, rows: Iterable[Row], where: str) -> Iterator[str]:
    """Yield each row's text, and turn the reader's failures into errors that name the file."""
    row = Row("the start", {})
    try:
        for row in rows:
            text = _text_of(source, row, where)
            if text:
                yield _valid(text, source, row, where)
    except InputError:
        raise
    except UnreadableFileError as error:
        raise InputError(f"source {source.name}: {where}: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"source {source.name}: {where}: {_not_utf8(Path(where), row, error)}") from None
    except Exception as error:  # the readers raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise InputError(f"source {source.name}: {where}: could not be read after {row.place}: {reason}") from error


def _text_of(source: SourceConfig, row: Row, where: str) -> str:
    _check_columns(source, row.values, f"{where} in {row.place}")
    for column in _columns(source):
        _check_cell(source, row, column, where)
    return row.values[source.text_field] if source.template is None else source.template.format_map(row.values)


def _check_columns(source: SourceConfig, there: Collection[str], where: str) -> None:
    for column in _columns(source):
        if column not in there:
            key = "text_field" if source.template is None else "template"
            columns = ", ".join(there) or "none"
            raise InputError(f"source {source.name}: {key}={column!r} is not a column of {where}; columns: {columns}")


def _check_cell(source: SourceConfig, row: Row, column: str, where: str) -> None:
    accepted = str if source.template is None else str | int | float
    if not isinstance(row.values[column], accepted):
        raise InputError(
            f"source {source.name}: column {column!r} of {where} must be text, "
            f"got {shown(row.values[column])} in {row.place}"
        )


def _valid(text: str, source: SourceConfig, row: Row, where: str) -> str:
    """Return the text if UTF-8 can represent it; put U+FFFD for halves of surrogate pairs if that is asked for."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if source.errors == "replace":
            return _SURROGATE.sub("\ufffd", text)
        half = ascii(text[error.start])
        remedy = "set errors: replace" if source.files else "replace such characters"
        raise InputError(
            f"source {source.name}: {where}: the text in {row.place} has {half}, half of a surrogate pair, which UTF-8 "
            f"cannot represent; {remedy}"
        ) from None
    return text


def _not_utf8(path: Path, row: Row, error: UnicodeDecodeError) -> str:
    if not path.is_file() or format_of(path) in ("parquet", "arrow"):
        return f"not UTF-8 text after {row.place} ({error}); write the file again"
    position, byte, n_bad = first_undecodable(path)
    others = f", and {n_bad - 1:,} more such bytes" if n_bad > 1 else ""
    return f"not UTF-8 text: byte {byte:#04x} at position {position}{others}; convert the file, or set errors: replace"
