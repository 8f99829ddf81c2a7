"""Documents from files and datasets, through real ``datasets`` calls, and what is said when they cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moe_gpt.config import SourceConfig
from moe_gpt.data import compressed
from moe_gpt.data.corpus import ReadingProgress, describe_origin, expand_files, iterate_documents
from moe_gpt.data.document import Document, is_held_out
from moe_gpt.errors import InputError


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Keep what ``datasets`` writes out of the user's cache, and the hub out of reach."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hugging_face")
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    """Write a file below the current folder and return its path."""
    path = Path.cwd() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(*rows: dict) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(**source) -> list[str]:
    """Return the texts of a source."""
    return [document.text for document in iterate_documents(SourceConfig(name="mine", **source))]


def failure(**source) -> str:
    """Return the error of a source: one line that starts with its name."""
    with pytest.raises(InputError) as caught:
        texts(**source)
    message = str(caught.value)
    assert re.match(r"source mine\b", message)
    assert "\n" not in message
    return message


def test_jsonl_gives_one_document_a_line():
    """A JSON lines file gives its rows' texts in order, without the empty ones."""
    path = write("a.jsonl", jsonl({"text": "one\nline"}, {"text": ""}, {"text": "caf\u00e9 \u4e2d"}))
    assert texts(files=path) == ["one\nline", "caf\u00e9 \u4e2d"]


def test_parquet_gives_one_document_a_row():
    """A parquet file gives the column that text_field names."""
    path = Path.cwd() / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["one", "two"]}), path)
    assert texts(files=str(path), text_field="body") == ["one", "two"]


def test_csv_gives_one_document_a_row():
    """A CSV file gives its column's cells, quoted commas and line ends included."""
    path = write("a.csv", 'id,text\n1,"one, two"\n2,"three\nfour"\n')
    assert texts(files=path) == ["one, two", "three\nfour"]


@pytest.mark.parametrize("cell", ["NA", "null", "None", "007", "3.50", "2020-01-01", "True"])
def test_csv_cell_is_text_as_it_stands(cell):
    """A cell that looks like a number, a date or a missing value is still text, spelled as in the file."""
    assert texts(files=write("a.csv", f"text,n\n{cell},1\n")) == [cell]


def test_csv_passes_over_empty_cells():
    """An empty cell is an empty document, which is left out as an empty line of JSON is."""
    assert texts(files=write("a.csv", "text,n\none,1\n,2\ntwo,3\n")) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "notes"])
def test_other_file_is_one_document(name):
    """A file of any other kind is one document, to the letter."""
    content = "First line.\n\n  Second \u4e2d.\t\n"
    assert texts(files=write(name, content)) == [content]


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_file_gives_no_document(name):
    """A file without content is passed over; the other files are read."""
    assert texts(files=(write(name, ""), write("full.txt", "text"))) == ["text"]


def test_kinds_of_files_mix():
    """One glob may match files of several kinds; they are read in the order of their paths."""
    write("data/b.txt", "from text")
    write("data/a.jsonl", jsonl({"text": "from json"}))
    write("data/deep/c.csv", "text,n\nfrom csv,1\n")
    assert texts(files="data/**/*.*") == ["from json", "from text", "from csv"]


def test_files_are_sorted_and_named_once():
    """Overlapping patterns give each file once, in the order of the paths."""
    for name in ("b.txt", "a.txt", "c.txt"):
        write(name, name)
    source = SourceConfig(name="mine", files=("c.txt", "*.txt", "a.txt"))
    assert [path.name for path in expand_files(source)] == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize("name", ["with space.txt", "\u00fc\u4e2d.txt", "#1.txt", "{x}.txt", "100%.txt"])
def test_file_of_any_name_is_read(name):
    """A path may have spaces, letters of any script and punctuation."""
    assert texts(files=write(name, "text")) == ["text"]


@pytest.mark.parametrize("name", ["draft [1].txt", "what?.txt", "all*.txt"])
def test_path_of_an_existing_file_is_that_file(name):
    """The path of a file that exists is that file, also where it could be read as a glob."""
    assert texts(files=write(name, "text")) == ["text"]


@pytest.mark.parametrize("name", ["a::b.txt", "a?::b.txt"])
def test_file_name_that_looks_like_a_chained_url_is_not_lost(name):
    """A name with ``::``, which datasets takes for a URL, is read or refused with its path, never passed over."""
    path = write(name, "text")
    try:
        found = texts(files=path)
    except InputError as error:
        found = [str(error)]
    assert found == ["text"] or name in found[0]


def test_local_files_are_read_without_the_network(monkeypatch):
    """Reading files tries no connection: it neither tells anybody nor waits where there is no network."""
    import datasets

    tried = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(address))
    files = (write("a.txt", "one"), write("b.jsonl", jsonl({"text": "two"})), write("c.csv", "text\nthree\n"))
    assert texts(files=files) == ["one", "two", "three"]
    assert tried == []


def test_split_key_is_the_text():
    """A document of a file is put on its side of the split by its text."""
    (document,) = iterate_documents(SourceConfig(name="mine", files=write("a.txt", "text")))
    assert document.split_key == document.text == "text"


@pytest.mark.parametrize(("limit", "expected"), [(1, ["a"]), (2, ["a", "b"]), (9, ["a", "b", "c"])])
def test_max_documents_limits_a_source(limit, expected):
    """A source ends after max_documents documents; empty ones do not count."""
    path = write("a.jsonl", jsonl(*({"text": text} for text in ("a", "", "b", "c"))))
    assert texts(files=path, max_documents=limit) == expected


def test_max_documents_limits_the_builtin_corpus():
    """The limit holds for the built-in corpus, too."""
    assert len(texts(builtin="prose", max_documents=3)) == 3


def test_missing_field_names_the_columns():
    """A text_field that is no column is an error with the field, the file and the columns that there are."""
    path = write("a.jsonl", jsonl({"body": "x", "title": "y"}))
    assert failure(files=path) == (
        f"source mine: text_field='text' is not a column of {path} in line 1; columns: body, title"
    )


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (5, "5"), (["x"], "['x']"), ({"a": 1}, "{'a': 1}")])
def test_row_that_is_not_text_names_column_value_and_row(value, shown):
    """A value that is not text is an error with the column, the file, the value and the row."""
    path = write("a.jsonl", jsonl({"text": value, "n": 1}))
    assert failure(files=path) == f"source mine: column 'text' of {path} must be text, got {shown} in line 1"


def test_missing_value_names_its_row():
    """A null among texts is an error with its row, after the rows before it were read."""
    path = write("a.jsonl", jsonl({"text": "one"}, {"text": None}))
    assert failure(files=path).endswith("must be text, got None in line 2")


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("a.txt", b"plain words, then caf"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "caf'),
        ("a.csv", b"text,n\none,1\ncaf"),
    ],
)
def test_bytes_that_are_not_utf8_name_file_and_position(name, before):
    """Bytes in another encoding are an error with the file, the byte and where it stands in the file."""
    after = b'"}\n' if name.endswith("jsonl") else b",2\n"
    path = write(name, before + "\u00e9".encode("latin-1") + after)
    message = failure(files=path)
    assert path in message
    assert f"not UTF-8 text: byte 0xe9 at position {len(before)};" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"caf\xe9 au lait"),
        ("a.jsonl", b'{"text": "caf\xe9 au lait"}\n'),
        ("a.csv", b"text,n\ncaf\xe9 au lait,1\n"),
        ("a.txt.gz", gzip.compress(b"caf\xe9 au lait", mtime=0)),
    ],
    ids=["text", "jsonl", "csv", "compressed"],
)
def test_bytes_that_are_not_utf8_can_be_replaced(name, content):
    """Where that is asked for, U+FFFD stands in their place; otherwise the error says how to ask."""
    path = write(name, content)
    assert "set errors: replace" in failure(files=path)
    assert texts(files=path, errors="replace") == ["caf\ufffd au lait"]


def fractions(**source) -> list[float | None]:
    """Return how far reading says it is at each document."""
    progress = ReadingProgress()
    return [progress.fraction for _ in iterate_documents(SourceConfig(name="mine", **source), progress)]


def test_progress_follows_the_files_read():
    """In share of bytes, also within a file; it never falls and never says more than all."""
    for i in range(3):
        write(f"{i}.jsonl", jsonl(*[{"text": "word " * 20}] * 10))
    write("3.jsonl.gz", gzip.compress(jsonl(*[{"text": "word " * 20}] * 10).encode()))
    seen = fractions(files="*.jsonl*")
    assert seen[0] is None
    assert sorted(seen[1:]) == seen[1:]
    assert seen[10] == pytest.approx(0.3, abs=0.05)
    assert seen[-1] <= 1


@pytest.mark.parametrize("streaming", [True, False])
def test_progress_of_a_dataset(streaming):
    """Follows the rows where their number is known, which it is not of a streamed folder; and max_documents."""
    write("folder/train.jsonl", jsonl(*[{"text": "word"}] * 10))
    folder = str(Path.cwd() / "folder")
    expected = [None] * 10 if streaming else [i / 10 for i in range(10)]
    assert fractions(dataset=folder, streaming=streaming) == expected
    assert fractions(dataset=folder, streaming=streaming, max_documents=5)[1:] == [0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 this is no parquet file"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n'),
        ("a.csv", b'text\n"never closed'),
    ],
)
def test_corrupt_file_is_named(name, content):
    """A file that its reader cannot read is one line with its path, not the reader's traceback."""
    path = write(name, content)
    assert path in failure(files=path)


def test_pattern_that_matches_nothing_is_refused():
    """A path or glob without a file is an error with the pattern and the folder, even beside one that matches."""
    message = failure(files=(write("a.txt", "text"), "b*.txt"))
    assert message == f"source mine: files='b*.txt' matches no file; the current folder is {Path.cwd()}"


def test_home_of_an_unknown_user_is_refused():
    """``~nobody-here`` is an error with the pattern."""
    assert "~no-such-user/a.txt" in failure(files="~no-such-user/a.txt")


def test_tilde_is_the_home_folder(monkeypatch):
    """``~`` in a path is the user's home."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    write("a.txt", "text")
    assert texts(files="~/a.txt") == ["text"]


@pytest.mark.parametrize("streaming", [True, False])
def test_unreachable_hub_is_one_line_that_says_what_works_without(streaming):
    """A dataset that cannot be fetched is one line with its name that points to files and builtin."""
    message = failure(dataset="someone/nothing", streaming=streaming)
    assert "dataset someone/nothing" in message
    assert "files:" in message
    assert "builtin:" in message


@pytest.mark.parametrize("streaming", [True, False])
def test_local_dataset_folder_is_read(streaming):
    """A folder is a dataset, read while streaming or prepared first."""
    write("folder/train.jsonl", jsonl({"body": "one"}, {"body": "two"}))
    write("folder/test.jsonl", jsonl({"body": "three"}))
    folder = str(Path.cwd() / "folder")
    assert texts(dataset=folder, text_field="body", streaming=streaming) == ["one", "two"]
    assert texts(dataset=folder, text_field="body", split="test", streaming=streaming) == ["three"]


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"split": "nope"}, ["split nope", "Available splits: ['train']"]),
        ({"subset": "nope"}, ["subset nope", "Available: ['default']"]),
        ({"text_field": "nope"}, ["text_field='nope'", "columns: text"]),
    ],
)
def test_part_that_a_dataset_lacks_is_refused(keys, parts):
    """A split, subset or column that a dataset does not have is an error that lists those it has."""
    write("folder/train.jsonl", jsonl({"text": "one"}))
    message = failure(dataset=str(Path.cwd() / "folder"), **keys)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", ["folder/readme.bin", "folder/folder.py"])
def test_folder_that_is_no_dataset_is_refused(name):
    """A folder without data, or with a loading script, is one line with its path."""
    folder = str(Path(write(name, "x = 1\n")).parent)
    assert folder in failure(dataset=folder)


def test_origin_changes_with_the_file():
    """What identifies a file's text changes when the file does, and not otherwise."""
    source = SourceConfig(name="mine", files=write("a.txt", "text"))
    before = describe_origin(source)
    assert describe_origin(source) == before
    os.utime("a.txt", ns=(1, 1))
    assert describe_origin(source) != before


def test_origin_of_a_local_dataset_changes_with_its_files():
    """What identifies a local dataset folder changes when a file in it does."""
    path = write("folder/train.jsonl", jsonl({"text": "one"}))
    source = SourceConfig(name="mine", dataset=str(Path.cwd() / "folder"))
    before = describe_origin(source)
    os.utime(path, ns=(1, 1))
    assert describe_origin(source) != before


COMPRESSORS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", jsonl({"text": "one"}, {"text": "zwei\nund \u00e9"}), ["one", "zwei\nund \u00e9"]),
        ("a.csv", "text,n\none,1\ntwo,2\n", ["one", "two"]),
        ("a.txt", "all of\nthis", ["all of\nthis"]),
        ("a.py", "x = 1\n", ["x = 1\n"]),
    ],
)
def test_compressed_files_are_read_as_what_they_hold(suffix, name, content, expected):
    """By both suffixes: the inner one says what is in it."""
    path = write(name + suffix, COMPRESSORS[suffix](content.encode()))
    assert texts(files=path) == expected


def test_archives_are_refused():
    """They hold many files, and which order is right nobody knows."""
    path = write("a.zip", b"PK")
    assert failure(files=path) == f"source mine: {path}: this is an archive; unpack it (.gz, .zst, .xz, .bz2 are read)"


def test_zst_without_its_package_says_what_to_install(monkeypatch):
    """The one compression that Python lacks."""
    path = write("a.jsonl.zst", zstandard.compress(b"{}"))
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: None)
    assert failure(files=path).endswith("run pip install zstandard")


def test_damaged_compressed_file_is_named():
    """Cut off in the middle."""
    path = write("a.jsonl.gz", gzip.compress(jsonl(*[{"text": str(i) * 50} for i in range(99)]).encode())[:60])
    assert path in failure(files=path)


def test_bytes_in_a_compressed_file_are_counted():
    """Position and number are those of what it holds."""
    path = write("a.txt.gz", gzip.compress(b"plain \xe9 and \xff\xfe"))
    assert "byte 0xe9 at position 6, and 2 more such bytes; convert the file" in failure(files=path)


def test_template_makes_a_text_of_several_columns():
    """Numbers too; doubled braces are braces."""
    path = write("a.jsonl", jsonl({"q": "why?", "a": "so", "n": 3}, {"q": "", "a": "", "n": 15}))
    assert texts(files=path, template="Q {q}\nA {a} {{{n}}}") == ["Q why?\nA so {3}", "Q \nA  {15}"]
    csv = write("a.csv", "q,a\nwhy?,007\n")
    assert texts(files=csv, template="{q} {a}") == ["why? 007"]


def test_template_of_a_missing_column_names_those_there_are():
    """With the key that is wrong."""
    path = write("a.jsonl", jsonl({"q": "x", "a": "y"}))
    assert failure(files=path, template="{q} {b}").endswith(
        f"template='b' is not a column of {path} in line 1; columns: q, a"
    )
    path = write("b.jsonl", jsonl({"q": "x", "a": None}))
    assert "column 'a' of" in failure(files=path, template="{q} {a}")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("no columns", "must name at least one column"),
        ("{}", "must name at least one column"),
        ("{a.__class__}", "must name at least one column"),
        ("{a[0]}", "must name at least one column"),
        ("{a:>10}", "must name at least one column"),
        ("{a!r}", "must name at least one column"),
        ("{a", "must have its braces in pairs"),
    ],
)
def test_template_is_columns_and_nothing_more(template, problem):
    """No attributes, indices or formats: a template from a stranger computes nothing."""
    with pytest.raises(InputError, match=problem):
        SourceConfig(name="mine", files="x", template=template)


def test_short_documents_and_repeats_are_passed_over():
    """By characters, and by exact text; max_documents counts what is left."""
    path = write("a.jsonl", jsonl(*({"text": text} for text in ["aaaa", "b", "aaaa", "cccc", "aaaa", "dddd"])))
    assert texts(files=path, min_chars=2) == ["aaaa", "aaaa", "cccc", "aaaa", "dddd"]
    assert texts(files=path, deduplicate=True) == ["aaaa", "b", "cccc", "dddd"]
    assert texts(files=path, deduplicate=True, min_chars=4, max_documents=2) == ["aaaa", "cccc"]


def test_a_part_is_random_nested_and_says_nothing_about_the_split():
    """About the share asked for, the same each time, a smaller one within a larger one, held out as the whole is."""
    path = write("a.jsonl", jsonl(*({"text": f"text {i}"} for i in range(2000))))
    half, tenth = (texts(files=path, part=part) for part in (0.5, 0.1))
    assert 900 < len(half) < 1100
    assert 150 < len(tenth) < 250
    assert set(tenth) < set(half)
    assert half == texts(files=path, part=0.5) != texts(files=path)[: len(half)]
    assert 60 < sum(is_held_out(Document(text, text), 0.1) for text in half) < 140
    with pytest.raises(InputError, match="part must be a number above 0 and at most 1, got 0"):
        SourceConfig(name="mine", files="x", part=0)


def test_json_text_stays_text():
    """A date is the text that the file has, and columns that nobody uses may come, go and change their type."""
    rows = [{"date": "2020-01-05", "text": f"row {i}", "d": "2020-01-01"} for i in range(3)]
    rows += [{"date": "unknown", "text": "late", "d": 7, "new": [1]}]
    path = write("a.jsonl", jsonl(*rows) + "\n  \n")
    assert texts(files=path, template="{date}: {text}") == [
        "2020-01-05: row 0", "2020-01-05: row 1", "2020-01-05: row 2", "unknown: late",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2 must be a JSON object, got [1]"),
        ("7", "line 2 must be a JSON object, got 7"),
        ('{"text": ', "line 2 is not valid JSON"),
        ("{}", "text_field='text' is not a column of"),
        ('{"text": null}', "must be text, got None in line 2"),
    ],
)
def test_wrong_line_is_named(line, message):
    """By its place in the file."""
    path = write("a.jsonl", jsonl({"text": "one"}) + line + "\n")
    found = failure(files=path)
    assert message in found
    assert "line 2" in found


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst"])
def test_cut_off_zstandard_file_is_an_error(name):
    """Its own reader would take what is there for all there is."""
    content = jsonl(*[{"text": str(i) * 50} for i in range(9999)]).encode()
    whole, kind = zstandard.compress(content), "text" if "txt" in name else "auto"
    path = write(name, whole[: len(whole) // 2])
    assert "ended before the end of its last frame" in failure(files=path, format=kind)
    assert path in failure(files=path, format=kind)
    write(name, zstandard.compress(content[:1000]) + zstandard.compress(content[1000:]))
    assert len("".join(texts(files=path, format=kind))) > 400_000


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.xz", "a.csv.bz2"])
def test_damaged_compressed_file_is_named_when_bytes_are_replaced(name):
    """Replacing bytes repairs text, not archives."""
    path = write(name, b"\xcd\x07 no such format" * 9)
    assert path in failure(files=path, errors="replace")


def test_archive_with_two_suffixes_is_an_archive():
    """As one with one is."""
    assert "this is an archive; unpack it" in failure(files=write("a.tar.gz", gzip.compress(b"x")))


def test_parquet_without_rows_is_passed_over():
    """As an empty file of any other kind is."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "a.parquet")
    write("b.txt", "text")
    assert texts(files=("a.parquet", "b.txt")) == ["text"]


def test_dataset_that_is_a_file_is_told_so():
    """Before anybody asks the hub for it."""
    path = write("a.jsonl", jsonl({"text": "one"}))
    assert f"is a file; write files: {path}" in failure(dataset=path)


def test_failure_of_a_local_folder_does_not_speak_of_the_network():
    """It has nothing to do with it."""
    write("folder/train.jsonl", jsonl({"text": "one"}))
    assert "network" not in failure(dataset=str(Path.cwd() / "folder"), split="nowhere")
