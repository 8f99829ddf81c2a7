"""Rows of local files: text, JSON, JSON lines, CSV, TSV, Parquet and Arrow, compressed or not.

The suffix says what a file is. Before a file is read, its first bytes are compared with what they should be, because a
file that is not what its name says would give wrong text without an error.
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moe_gpt.data.compressed import UnreadableFileError, open_bytes, open_span
from moe_gpt.data.disguises import begins_with_json_lines, format_of, refuse_disguise
from moe_gpt.errors import shown
from moe_gpt.files.inside import parse_json

_ROWS_AT_ONCE = 1024
"""Rows of a table that are Python objects at a time, however many a file holds, or says that it holds."""
_LEAST_BYTES = 8
"""A column or part in a Parquet footer has as many; a list that says it has more would take 680 bytes for each."""


class Row(NamedTuple):
    """The values of a row by column, and where it stands: line 3, or row 3, counted from 1."""

    place: str
    values: dict[str, Any]


def read_rows(
    path: Path, format: str, columns: tuple[str, ...], errors: str, span: tuple[int, int] | None = None
) -> Iterator[Row]:
    """Yield the rows of a file; of a text, the one row with the column ``text``.

    Args:
        format: auto, or one of the values of ``FORMATS``, or text.
        columns: those that are wanted. Others may be left out, and are not decoded.
        errors: strict or replace, for bytes that are not UTF-8.
        span: only lines that begin at these bytes (start, and the first byte after them). Only for JSON lines in a
            file that is not compressed.

    Raises:
        UnreadableFileError: saying what is wrong with the file.
        UnicodeDecodeError: at bytes that are not UTF-8.
    """
    kind = format_of(path) if format == "auto" else format
    refuse_disguise(path, kind, is_given=format != "auto")
    if span:
        yield from _json_lines_of(path, span, errors)
        return
    if kind in ("parquet", "arrow"):
        with open_bytes(path) as file:
            if not file.seekable():
                raise UnreadableFileError(f"a {kind} file cannot be read through {path.suffix}; unpack it")
            yield from (_parquet_rows if kind == "parquet" else _arrow_rows)(file, columns)
        return
    newline = "" if kind in ("csv", "tsv") else None
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors=errors, newline=newline) as file:
        yield from _READERS[kind](file, columns)


def _text_row(file: io.TextIOWrapper, columns: tuple[str, ...]) -> Iterator[Row]:
    yield Row("row 1", {"text": file.read()})


def _json_lines(lines: Iterable[str], columns: tuple[str, ...], where: str = "") -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            place = f"line {number}{where}"
            yield Row(place, _json_object(line, place))


def _json_lines_of(path: Path, span: tuple[int, int], errors: str) -> Iterator[Row]:
    start, stop = span
    encoding, where = ("utf-8", f" after byte {start:,}") if start else ("utf-8-sig", "")
    with io.TextIOWrapper(open_span(path, start, stop), encoding=encoding, errors=errors) as file:
        yield from _json_lines(file, (), where)


def _json_object(text: str, place: str) -> dict[str, Any]:
    row = _parse_json(text, place)
    if not isinstance(row, dict):
        raise UnreadableFileError(f"{place} must be a JSON object, got {text.strip()[:60]}")
    return row


def _parse_json(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{place} is not valid JSON: {error}") from None


def _json_rows(file: io.TextIOWrapper, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a list of objects, of objects in lines, or of an object whose columns are lists."""
    lines: list[str] = []
    for line in file:
        lines.append(line)
        if len(list(filter(str.strip, lines))) == 2:
            break
    if begins_with_json_lines("".join(lines)):
        yield from _json_lines(itertools.chain(lines, file), columns)
        return
    found = _parse_json("".join([*lines, file.read()]), "the file")
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(_rows_of_columns(found, columns) if isinstance(found, dict) else rows, 1):
        if not isinstance(row, dict):
            raise UnreadableFileError(f"row {number} must be a JSON object, got {shown(row)}")
        yield Row(f"row {number}", row)


def _rows_of_columns(found: dict[str, Any], columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of columns that are lists; an object with other values is one row."""
    lists = [found.get(column) for column in columns]
    if not all(isinstance(values, list) for values in lists):
        return [found]
    if len({len(values) for values in lists}) > 1:  # type: ignore[arg-type]
        raise UnreadableFileError(f"the lists of {', '.join(columns)} must have the same length")
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]  # type: ignore[arg-type]


def _table_rows(file: io.TextIOWrapper, columns: tuple[str, ...], separator: str) -> Iterator[Row]:
    """Rows of CSV or TSV; every row must have as many cells as the header."""
    csv.field_size_limit(sys.maxsize)
    table, line = csv.reader(file, delimiter=separator, strict=True), 1
    try:
        header = next(table, [])
        _check_header(header, columns, separator)
        line = table.line_num + 1
        for cells in table:
            if cells:
                yield Row(f"line {line}", dict(zip(header, _fitting(cells, header, line, separator), strict=True)))
            line = table.line_num + 1
    except csv.Error as error:
        raise UnreadableFileError(_bad_row(error, line, separator)) from None


def _bad_row(error: csv.Error, line: int, separator: str) -> str:
    return (
        f"the row that begins in line {line} is not valid: {error}; a cell that has quotes, line ends or "
        f"{separator!r} must stand in double quotes, with its own quotes doubled"
    )


def _check_header(header: list[str], columns: tuple[str, ...], separator: str) -> None:
    for column in columns:
        if header.count(column) > 1:
            raise UnreadableFileError(f"the column {column!r} occurs {header.count(column)} times in the header")
    _check_separator(header, columns, separator)


def _check_separator(header: list[str], columns: tuple[str, ...], separator: str) -> None:
    others = [other for other in ",;\t|" if other != separator and len(header) == 1 and other in header[0]]
    if others and header[0] not in columns:
        remedy = "set format: tsv" if others[0] == "\t" else f"separate its cells by {separator!r}"
        raise UnreadableFileError(f"the header's cells seem to be separated by {others[0]!r}; {remedy}")


def _fitting(cells: list[str], header: list[str], line: int, separator: str) -> list[str]:
    """Return the cells without empty ones beyond the header."""
    if len(cells) < len(header) or any(cells[len(header) :]):
        too_many = f"put a cell that has {separator!r} into double quotes"
        remedy = too_many if len(cells) > len(header) else f"end the row with {separator!r} for each cell that is empty"
        raise UnreadableFileError(f"line {line} has {len(cells)} cells, and the header has {len(header)}; {remedy}")
    return cells[: len(header)]


class _Bounded:
    """A file that is not asked for more bytes than it has, for which Python would set memory aside."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size = file, file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """Read at most ``size`` bytes."""
        return self._file.read(min(size, self.size - self._file.tell()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _parquet_rows(file: BinaryIO, columns: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow.parquet

    bounded = _Bounded(file)
    bounded.seek(max(0, bounded.size - 8))
    longest_list = min(1_000_000, max(10_000, int.from_bytes(bounded.read(4), "little") // _LEAST_BYTES))
    with pyarrow.parquet.ParquetFile(bounded, thrift_container_size_limit=longest_list) as table:
        _check_columns(table.schema_arrow.names, columns)
        yield from _rows_of(table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(columns)))


def _arrow_rows(file: BinaryIO, columns: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        table = pyarrow.ipc.open_file(_Bounded(file))
        batches: Any = (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        batches = table = pyarrow.ipc.open_stream(_Bounded(file))
    _check_columns(table.schema.names, columns)
    yield from _rows_of(_validated(batch.select(list(columns))) for batch in batches)


def _validated(batch: Any) -> Any:
    """Return a batch whose offsets lie inside it: reading a damaged one would end the process."""
    batch.validate(full=True)
    return batch


def _rows_of(batches: Iterable[Any]) -> Iterator[Row]:
    parts = (batch.slice(at, _ROWS_AT_ONCE) for batch in batches for at in range(0, batch.num_rows, _ROWS_AT_ONCE))
    rows = itertools.chain.from_iterable(part.to_pylist() for part in parts)
    return (Row(f"row {number}", row) for number, row in enumerate(rows, 1))


def _check_columns(names: list[str], columns: tuple[str, ...]) -> None:
    for column in columns:
        if names.count(column) != 1:
            problem = "is not a column" if column not in names else f"is the name of {names.count(column)} columns"
            raise UnreadableFileError(f"{column!r} {problem}; columns: {', '.join(names) or 'none'}")


_READERS: dict[str, Callable[[Any, tuple[str, ...]], Iterator[Row]]] = {
    "text": _text_row,
    "lines": _json_lines,
    "json": _json_rows,
    "csv": lambda file, columns: _table_rows(file, columns, ","),
    "tsv": lambda file, columns: _table_rows(file, columns, "\t"),
}
