"""Where text comes from: the built-in corpus, local files, the Hugging Face hub.

Everything but the built-in corpus is opened through ``datasets.load_dataset``, so that a local file and a dataset
on the hub take the same path. Documents come in a fixed order; nothing is shuffled here.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_gpt.config import SourceConfig
from moe_gpt.data.builtin_corpus import Document, iterate_builtin, source_files
from moe_gpt.validation import InputError


def iterate_documents(source: SourceConfig) -> Iterator[Document]:
    """Yield a source's documents that are not empty, at most ``max_documents``.

    Raises:
        InputError: naming the source and what is wrong with it: no files, no such field, bytes that are not UTF-8,
            a hub that cannot be reached.
    """
    if source.builtin:
        documents = iterate_builtin(source.builtin)
    else:
        documents = (Document(text, text) for text in _iterate_texts(source))
    for count, document in enumerate(documents):
        if count == source.max_documents:
            return
        yield document


def describe_origin(source: SourceConfig) -> dict[str, Any]:
    """Return what identifies a source's text without reading all of it: for files, their sizes and times too."""
    keys = ("builtin", "files", "dataset", "subset", "split", "revision", "text_field", "max_documents", "max_tokens")
    origin: dict[str, Any] = {key: getattr(source, key) for key in keys}
    origin["stat"] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _local_files(source)]
    return origin


def _local_files(source: SourceConfig) -> list[Path]:
    if source.builtin:
        return source_files()
    if source.files:
        return expand_files(source)
    folder = Path(source.dataset or "")  # a dataset may be a local folder
    return sorted(path.resolve() for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def expand_files(source: SourceConfig) -> list[Path]:
    """Return the files that the source's paths and globs name, sorted.

    Raises:
        InputError: where a path or glob matches nothing.
    """
    patterns = source.files if isinstance(source.files, tuple) else (source.files or "",)
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(os.path.expanduser(pattern))
        matches = [path] if path.is_file() else [Path(match) for match in glob.glob(str(path), recursive=True)]
        matches = [match.resolve() for match in matches if match.is_file()]
        if not matches:
            remedy = f"it is a folder, write '{pattern}/*.txt'" if path.is_dir() else f"the folder is {Path.cwd()}"
            raise InputError(f"source {source.name}: files={pattern!r} matches no file; {remedy}")
        files.update(matches)
    return sorted(files)


_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip")


def _iterate_texts(source: SourceConfig) -> Iterator[str]:
    if source.dataset:
        yield from _read_field(source, _open_hub(source), f"dataset {source.dataset}", source.text_field)
        return
    for path in expand_files(source):
        if "::" in str(path):
            raise InputError(f"source {source.name}: a path must not contain '::', got {path}; rename the file")
        if path.suffix.lower() in _COMPRESSED:
            raise InputError(f"source {source.name}: {path} is compressed; unpack it first")
        if path.stat().st_size == 0:
            continue
        builder = _BUILDERS.get(path.suffix.lower(), "text")
        field = source.text_field if builder != "text" else "text"
        yield from _read_field(source, _file_rows(builder, path, field), str(path), field)


def _file_rows(builder: str, path: Path, field: str) -> Iterator[Any]:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise each file is reported over the network
    options: dict[str, Any] = {}
    if builder == "text":
        options = {"sample_by": "document"}
    if builder == "csv":  # a cell is text, whatever it looks like
        options = {"converters": {field: str}, "keep_default_na": False}
    yield from datasets.load_dataset(
        builder, data_files=glob.escape(str(path)), split="train", streaming=True, **options
    )


def _open_hub(source: SourceConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # datasets has RuntimeError and others of its own besides
        raise InputError(
            f"source {source.name}: dataset {source.dataset} (subset {source.subset}, split {source.split}) could not "
            f"be opened: {_one_line(error)}; local files: and builtin: work without a network"
        ) from error


def _read_field(source: SourceConfig, rows: Any, where: str, field: str) -> Iterator[str]:
    """Yield one column of a dataset, turning the reader's failures into errors that name the file."""
    row_number = 0
    try:
        for row_number, row in enumerate(rows):
            if field not in row:
                raise InputError(
                    f"source {source.name}: text_field={field!r} is not a column of {where}; there are {', '.join(row)}"
                )
            if not isinstance(row[field], str):
                raise InputError(
                    f"source {source.name}: column {field!r} of {where} must be text, "
                    f"got {row[field]!r} in row {row_number}"
                )
            if row[field]:
                yield row[field]
    except InputError:
        raise
    except Exception as error:  # datasets wraps its readers' failures in several types of its own
        raise InputError(f"source {source.name}: {where}: {_reading_failure(error, row_number, where)}") from error


def _reading_failure(error: BaseException, row_number: int, where: str) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnicodeDecodeError):
            cause = _decoding_failure(Path(where)) or cause
            return f"not UTF-8 text: byte {cause.object[cause.start]:#04x} at position {cause.start}; convert the file"
        cause = cause.__cause__ or cause.__context__
    return f"could not be read after row {row_number}: {_one_line(error)}"


def _decoding_failure(path: Path) -> UnicodeDecodeError | None:
    """Return where a file stops being UTF-8; the reader's own error counts from the start of its piece."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    except OSError:  # not a local file
        return None
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
