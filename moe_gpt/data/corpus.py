"""Reading documents from the built-in corpus, local files or the Hugging Face hub.

``datasets.load_dataset`` opens everything except the built-in corpus, so local files and datasets of the hub take the
same path. Documents come in a fixed order; nothing is shuffled here.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_gpt.config import SourceConfig
from moe_gpt.data.builtin_corpus import iterate_builtin, source_files
from moe_gpt.data.document import Document
from moe_gpt.errors import InputError, shown


@dataclasses.dataclass
class ReadingProgress:
    """The approximate share of a source that has been read, from 0 to 1; None if it is unknown."""

    fraction: float | None = None


def iterate_documents(source: SourceConfig, progress: ReadingProgress | None = None) -> Iterator[Document]:
    """Yield at most ``max_documents`` documents of a source that have at least ``min_chars``.

    ``deduplicate`` yields each text once and keeps 16 bytes of digest for every document.

    Args:
        progress: kept up to date while reading.

    Raises:
        InputError: naming the source and its problem: no files, no such column, bytes that are not UTF-8, a hub that
            cannot be reached.
    """
    progress = progress or ReadingProgress()
    documents = _all_documents(source, progress)
    documents = (document for document in documents if len(document.text) >= source.min_chars)
    if source.deduplicate:
        documents = _without_repeats(documents)
    yield from _counted(documents, source.max_documents, progress) if source.max_documents else documents


def _counted(documents: Iterator[Document], limit: int, progress: ReadingProgress) -> Iterator[Document]:
    for index, document in enumerate(itertools.islice(documents, limit)):
        progress.fraction = max(progress.fraction or 0.0, index / limit)
        yield document


def _all_documents(source: SourceConfig, progress: ReadingProgress) -> Iterator[Document]:
    if source.builtin:
        return iterate_builtin(source.builtin)
    texts = _dataset_texts(source, progress) if source.dataset else _files_texts(source, progress)
    return (Document(text, text) for text in texts)


def _without_repeats(documents: Iterator[Document]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            yield document


_ORIGIN = (
    "builtin", "files", "dataset", "subset", "split", "revision", "text_field", "template", "errors", "min_chars",
    "deduplicate", "max_documents", "max_tokens",
)  # fmt: skip


def describe_origin(source: SourceConfig) -> dict[str, Any]:
    """Return what identifies a source's text without reading it: settings, and the sizes and times of files."""
    origin: dict[str, Any] = {key: getattr(source, key) for key in _ORIGIN}
    origin["python"] = platform.python_version() if source.builtin else None
    origin["stat"] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _local_files(source)]
    return origin


def _local_files(source: SourceConfig) -> list[Path]:
    if source.builtin:
        return source_files()
    if source.files:
        return expand_files(source)
    found = Path(str(source.dataset)).rglob("*")  # none unless the dataset is a local folder
    return sorted(path.resolve() for path in found if path.is_file())


def expand_files(source: SourceConfig) -> list[Path]:
    """Return the files that the source's paths and globs match, sorted."""
    patterns = source.files if isinstance(source.files, tuple) else (str(source.files),)
    return sorted(set().union(*(_matches(source.name, pattern) for pattern in patterns)))


def _matches(name: str, pattern: str) -> set[Path]:
    path = Path(os.path.expanduser(pattern))
    found = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
    files = {Path(match).resolve() for match in found if os.path.isfile(match)}
    if not files:
        remedy = f"for a folder, write '{pattern}/*.txt'" if path.is_dir() else f"the current folder is {Path.cwd()}"
        raise InputError(f"source {name}: files={pattern!r} matches no file; {remedy}")
    return files


_BUILDERS = {".jsonl": "lines", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def _files_texts(source: SourceConfig, progress: ReadingProgress) -> Iterator[str]:
    paths = expand_files(source)
    sizes = [path.stat().st_size for path in paths]
    n_bytes, n_finished, n_chars = sum(sizes), 0, 0
    bytes_per_char = 1 / 3 if paths[0].suffix.lower() in _COMPRESSED else 1.0
    for path, size in zip(paths, sizes, strict=True):
        n_chars_before = n_chars
        for text in _file_texts(source, path) if size else ():
            yield text
            n_chars += len(text)
            read = min(size, (n_chars - n_chars_before) * bytes_per_char)
            progress.fraction = (n_finished + read) / n_bytes
        n_finished += size
        bytes_per_char = n_finished / n_chars if n_chars else bytes_per_char


def _dataset_texts(source: SourceConfig, progress: ReadingProgress) -> Iterator[str]:
    dataset = _open_hub(source)
    try:
        n_rows = len(dataset)
    except TypeError:  # a streamed one; the hub may know
        n_rows = getattr((dataset.info.splits or {}).get(source.split), "num_examples", None) or 0

    def rows() -> Iterator[Any]:
        for index, row in enumerate(dataset):
            progress.fraction = min(1.0, index / n_rows) if n_rows else None
            yield row

    yield from _read_texts(source, rows(), f"dataset {source.dataset}")


def _file_texts(source: SourceConfig, path: Path) -> Iterator[str]:
    if "::" in str(path):
        raise InputError(f"source {source.name}: a path must not contain '::', got {path}; rename the file")
    builder = _builder_for(source, path)
    if builder == "text":
        source = dataclasses.replace(source, text_field="text", template=None)
    yield from _read_texts(source, _file_rows(builder, path, source), str(path))


@contextlib.contextmanager
def _with_bytes_replaced(path: Path) -> Iterator[Path]:
    """Make a temporary uncompressed UTF-8 copy, because not every reader of ``datasets`` can replace bytes."""
    import fsspec

    name = path.stem if path.suffix.lower() in _COMPRESSED else path.name
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        opened = fsspec.open(str(path), "rt", compression="infer", encoding="utf-8", errors="replace", newline="")
        with opened as original, open(copy, "w", encoding="utf-8", newline="") as written:
            shutil.copyfileobj(original, written)
        yield copy


def _builder_for(source: SourceConfig, path: Path) -> str:
    """Return the reader of ``datasets`` for a file, looking through one layer of compression."""
    suffix = path.suffix.lower()
    if path.name.lower().endswith(_ARCHIVES):
        raise InputError(f"source {source.name}: {path} is an archive; unpack it (.gz, .zst, .xz, .bz2 are read)")
    if suffix == ".zst" and not importlib.util.find_spec("zstandard"):
        raise InputError(f"source {source.name}: {path} needs the package zstandard; run pip install zstandard")
    return _BUILDERS.get(path.with_suffix("").suffix.lower() if suffix in _COMPRESSED else suffix, "text")


def _columns(source: SourceConfig) -> tuple[str, ...]:
    return (source.text_field,) if source.template is None else source.template_fields


def _file_rows(builder: str, path: Path, source: SourceConfig) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() == ".zst":
        _check_zstandard(path)
    with contextlib.ExitStack() as stack:
        if source.errors == "replace" and builder != "parquet":
            path = stack.enter_context(_with_bytes_replaced(path))
        if path.suffix.lower() == ".parquet" and _is_empty_parquet(path):
            return
        rows = _open_rows(builder, path, _columns(source))
        yield from _parse_lines(rows) if builder == "lines" else rows


def _open_rows(builder: str, path: Path, columns: tuple[str, ...]) -> Any:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise it reports each file over the network
    options_of: dict[str, dict[str, Any]] = {
        "text": {"sample_by": "document"},
        "lines": {"sample_by": "line"},  # its JSON reader turns dates into times, and fails if columns vary
        "csv": {"converters": dict.fromkeys(columns, str), "keep_default_na": False},  # a cell is text
    }
    options = options_of.get(builder, {})
    builder = "text" if builder == "lines" else builder
    return datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=True, **options)


def _parse_lines(rows: Any) -> Iterator[dict[str, Any]]:
    for line in filter(str.strip, (row["text"] for row in rows)):
        row = json.loads(line.removeprefix("\ufeff"))
        if not isinstance(row, dict):
            raise ValueError(f"a line must be a JSON object, got {shown(row)}")
        yield row


def _is_empty_parquet(path: Path) -> bool:
    """Whether the file has no rows; its reader would fail on it."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).metadata.num_rows == 0


def _check_zstandard(path: Path) -> None:
    """Raise EOFError if the file ends in the middle of a frame; its reader would not notice."""
    import zstandard

    with open(path, "rb") as file:
        frame = zstandard.ZstdDecompressor().decompressobj()
        is_inside = False
        while block := file.read(1 << 20):
            while block:
                frame.decompress(block)
                is_inside, block = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
        if is_inside:
            raise EOFError("compressed file ended before the end of its last frame")


def _open_hub(source: SourceConfig) -> Any:
    import datasets

    path = Path(str(source.dataset))
    if path.is_file():
        raise InputError(f"source {source.name}: dataset={source.dataset!r} is a file; write files: {source.dataset}")
    try:
        return datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # datasets raises many types
        raise InputError(
            f"source {source.name}: dataset {source.dataset} (subset {source.subset}, split {source.split}) could not "
            f"be opened: {_one_line(error)}" + ("" if path.exists() else "; without a network, use files: or builtin:")
        ) from error


def _read_texts(source: SourceConfig, rows: Any, where: str) -> Iterator[str]:
    """Yield each row's text, and turn the reader's failures into errors that name the file."""
    row_number, columns = 0, _columns(source)
    try:
        for row_number, row in enumerate(rows):
            for column in columns:
                _check_cell(source, row, column, where, row_number)
            text = _text_of(source, row)
            if text:
                yield text
    except InputError:
        raise
    except Exception as error:  # datasets wraps its readers' errors in many types
        raise InputError(f"source {source.name}: {where}: {_reading_failure(error, row_number, where)}") from error


def _text_of(source: SourceConfig, row: dict[str, Any]) -> str:
    return row[source.text_field] if source.template is None else source.template.format_map(row)


def _check_cell(source: SourceConfig, row: dict[str, Any], column: str, where: str, row_number: int) -> None:
    key = "text_field" if source.template is None else "template"
    if column not in row:
        at, there = f" in row {row_number}" if row_number else "", ", ".join(row) or "none"
        raise InputError(f"source {source.name}: {key}={column!r} is not a column of {where}{at}; columns: {there}")
    accepted = str if source.template is None else str | int | float
    if not isinstance(row[column], accepted):
        raise InputError(
            f"source {source.name}: column {column!r} of {where} must be text, "
            f"got {shown(row[column])} in row {row_number}"
        )


def _reading_failure(error: BaseException, row_number: int, where: str) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnicodeDecodeError):
            found = _undecodable(Path(where)) or [(cause.start, cause.object[cause.start])]
            (position, byte), more = found[0], len(found) - 1
            others = f", and {more:,} more such bytes" if more else ""
            remedy = "convert the file, or set errors: replace"
            return f"not UTF-8 text: byte {byte:#04x} at position {position}{others}; {remedy}"
        cause = cause.__cause__ or cause.__context__
    return f"could not be read after row {row_number}: {_one_line(error)}"


def _undecodable(path: Path) -> list[tuple[int, int]]:
    """Return position in the file and value of each byte that is not UTF-8; the reader's positions are others."""
    import fsspec

    found: list[tuple[int, int]] = []

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        found.append((error.start, error.object[error.start]))
        return "", error.start + 1

    codecs.register_error("moe_gpt_note", note)
    opened = fsspec.open(str(path), "rb", compression="infer")
    with contextlib.suppress(OSError), opened as file:  # an OSError: not a local file
        file.read().decode("utf-8", "moe_gpt_note")
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
