"""Files that users bring: rows of every kind are read right, or refused with the place and what would be right."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpt.config import SourceConfig
from moe_gpt.data.corpus import iterate_documents
from moe_gpt.errors import InputError

law = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return name


def texts(files: str | tuple = (), **source) -> list[str]:
    return [document.text for document in iterate_documents(SourceConfig(name="s", files=files or None, **source))]


def failure(name: str, content: str | bytes, **source) -> str:
    """Return the error of a file, which is one line that names it."""
    with pytest.raises(InputError) as caught:
        texts(write(name, content), **source)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    return message


@law
@given(st.lists(st.tuples(st.text(min_size=1), st.text()), min_size=1, max_size=5), st.sampled_from(["csv", "tsv"]))
def test_tables_give_back_what_was_written(tmp_path_factory, rows, kind):
    """Whatever the cells are: separators, quotes, line ends, letters of any script."""
    rows = [[cell.replace("\r", "").replace("\0", "") for cell in row] for row in rows]
    path = tmp_path_factory.mktemp("tables") / f"a.{kind}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="," if kind == "csv" else "\t").writerows([["text", "other"], *rows])
    assert texts(str(path)) == [text for text, _ in rows if text]


@law
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.sampled_from([".jsonl", ".ndjson", ".json"]))
def test_json_gives_back_what_was_written(tmp_path_factory, rows, suffix):
    """In lines, and as a list; text that UTF-8 cannot represent never gets through."""
    objects = [{"n": number, "text": text} for number, text in enumerate(rows)]
    path = tmp_path_factory.mktemp("json") / f"a{suffix}"
    as_list = json.dumps(objects, indent=1) if suffix == ".json" else "\n".join(map(json.dumps, objects))
    path.write_text(as_list, encoding="utf-8")
    assert texts(str(path)) == rows


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "a.jsonl", "a.json"])
def test_lines_of_json_are_rows(name):
    """Under each of their suffixes, with a byte order mark and blank lines."""
    assert texts(write(name, '\ufeff{"text": "one"}\n\n{"text": "two"}\n')) == ["one", "two"]


def test_json_columns_are_rows():
    """An object whose columns are lists is a table; with one value it is one row."""
    assert texts(write("a.json", '{"text": ["one", "two"], "n": 3}')) == ["one", "two"]
    assert texts(write("b.json", '{"text": "one", "n": [3]}')) == ["one"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,n\none,1,\ntwo,2,\n", ["one", "two"]),  # commas at the ends of lines
        ("\ufefftext,n\r\none,1\r\n", ["one"]),
        ("n,text\n1,2020-01-01\n\n2,007\n", ["2020-01-01", "007"]),
    ],
)
def test_harmless_oddities_of_csv_are_read(content, expected):
    """No cell moves into another column."""
    assert texts(write("a.csv", content)) == expected


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("text,n\none, and a half,1\n", ["line 2", "3 cells", "2", "double quotes"]),
        ("text,n\none,1\ntwo\n", ["line 3", "1 cells", "end the row with ','"]),
        ("text,text\na,b\n", ["'text' occurs 2 times"]),
        ("text;n\none;1\n", ["separated by ';'"]),
        ("text\tn\none\t1\n", ["format: tsv"]),
        ('text\n"never closed\nand on', ["line 2", "quotes"]),
        ('text\n"one"two\n', ["line 2", "quotes"]),
    ],
)
def test_ragged_tables_are_refused(content, parts):
    """With the line, and what would be right."""
    message = failure("a.csv", content)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "a", "text": "b"}\n', ["line 1", "'text' occurs twice"]),
        ('{"text": "a"}\n{"text": NaN}\n', ["line 2", "nan"]),
        ('{"text": "a"}\n[[' + "[" * 100_000, ["line 2", "not valid JSON"]),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', ["line 2", "\\ud83d", "errors: replace"]),
        ('{"text": "a"}\n{"text": {"a": 1}}\n', ["line 2", "must be text"]),
        (f'{{"text": {"9" * 6000}}}\n', ["line 1", "must be text, got Decimal('999"]),
    ],
)
def test_odd_json_is_refused(content, parts):
    """Also a key that occurs twice, of which most readers take the last."""
    message = failure("a.jsonl", content)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_number_of_many_digits_in_another_column_is_passed_over(name):
    """Python converts no more than 4300 of them."""
    line = f'{{"text": "one", "n": {"9" * 6000}}}\n'
    assert texts(write(name, line * 2)) == ["one", "one"]
    assert "must be a JSON object" in failure("b.json", f"[{'9' * 6000}]")


def test_half_of_a_pair_can_be_replaced():
    """As bytes that are not UTF-8 are."""
    assert texts(write("a.jsonl", '{"text": "a\\ud83db"}\n'), errors="replace") == ["a\ufffdb"]


def image_table(name: str) -> str:
    image = pyarrow.array([{"bytes": b"no image", "path": None}] * 2)
    table = pyarrow.table({"image": image, "text": ["one one", "two two"]})
    features = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    Path(name).parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, name)
    return name


def test_columns_that_nobody_asks_for_are_not_decoded(monkeypatch, tmp_path):
    """An image beside the text may be damaged, in files and in datasets."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(image_table("a.parquet")) == ["one one", "two two"]
    image_table("folder/train.parquet")
    for streaming in (True, False):
        assert texts(dataset="folder", streaming=streaming) == ["one one", "two two"]


@pytest.mark.parametrize("is_dict", [True, False])
def test_folder_saved_by_datasets_is_read(is_dict):
    """As a dataset and by its Arrow files; given as files, the error says how."""
    import datasets

    data = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    (datasets.DatasetDict(train=data) if is_dict else data).save_to_disk("saved")
    assert texts(dataset="saved") == ["one", "two"]
    assert texts("saved/**/*.arrow") == ["one", "two"]
    if not is_dict:
        with pytest.raises(InputError, match="dataset: saved"):
            texts("saved")


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_files_are_read(make):
    """Both of Arrow's formats."""
    table = pyarrow.table({"text": ["one", "two"], "n": [1, 2]})
    with make("a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts("a.arrow") == ["one", "two"]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><body>404 Not Found</body></html>"
PACKED = gzip.compress(b"text", mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        *((f"a{suffix}", LFS, "git lfs pull") for suffix in (".txt", ".jsonl", ".parquet", ".csv", ".txt.gz", ".py")),
        *((f"a{suffix}", PAGE, "download") for suffix in (".txt", ".jsonl", ".csv", ".json", ".tsv", "")),
        ("a.parquet", PAGE, "not a parquet file"),
        ("a.txt.gz", PAGE, "not a .gz file"),
        ("a.xml.txt", '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "download"),
        ("a.txt", b"PK\x03\x04rest", "ZIP"),
        ("a.csv", b"PK\x03\x04rest", "ZIP"),
        ("a.txt", b"%PDF-1.7\n", "save its text"),
        ("a.txt", PACKED, "add .gz"),
        ("a.jsonl.gz", zstandard.compress(b"text"), "add .zst"),
        ("a.txt", b"PAR1....", "name it .parquet"),
        ("a.txt", "text".encode("utf-16"), "convert it to UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), "NUL bytes"),
        *(("a.txt", "\ufefftext".encode(name), "iconv -f UTF-32") for name in ("utf-32-le", "utf-32-be")),
        *((f"a.txt.gz{end}", gzip.compress(PACKED, mtime=0), "packed twice; unpack") for end in ("", ".gz")),
        ("a.jsonl.gz", gzip.compress(zstandard.compress(b"{}"), mtime=0), "packed twice; unpack"),
        ("a.txt.gz", gzip.compress(b"n" * 257 + b"ustar", mtime=0), "tar archive"),
        *((f"a{suffix}", b"", "0 bytes") for suffix in (".parquet", ".arrow", ".json", ".json.gz", ".txt.zst")),
        ("a.xlsx", b"x", "save it as .csv"),
        ("a.docx", b"x", "save its text"),
        ("a.jsonl.incomplete", b"{", "download"),
        ("a.txt", '{"text": "one"}\n{"text": "two"}\n', "format: lines"),
        ("notes", '{"text": "one"}\n{"text": "two"}\n', "format: lines"),
    ],
)
def test_files_disguised_as_others_are_refused(name, content, part):
    """One line that says what the file is, and what to do."""
    assert part in failure(name, content)


def test_given_format_counts_more_than_the_name():
    """Pages and lines of JSON are text where somebody says so; a name without suffix may be a table."""
    assert texts(write("a.txt", PAGE), format="text") == [PAGE]
    assert texts(write("b.txt", '{"text": "one"}\n{"text": "two"}\n'), format="lines") == ["one", "two"]
    assert texts(write("c", "n\ttext\n1\tone\n"), format="tsv") == ["one"]
    assert texts(write("a.html", PAGE)) == [PAGE]


def test_long_window_of_zstandard_says_what_to_do():
    """The reader's memory stays small, so the file is refused."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    out = io.BytesIO()
    with compressor.stream_writer(out, closefd=False) as writer:
        writer.write(b'{"text": "one"}\n')
    assert "zstd -d --long=31" in failure("a.jsonl.zst", out.getvalue())


def test_many_small_files_are_read_at_once_and_long_lines_too():
    """Time and memory grow with the bytes, not with the files times the bytes."""
    for number in range(2000):
        write(f"{number}.txt", f"text {number}")
    write("long.jsonl", json.dumps({"text": "x" * 20_000_000}) + "\n")
    found = texts("*.*")
    assert len(found) == 2001
    assert len(found[-1]) == 20_000_000


def test_loops_of_links_end():
    """Two links that lead back would be followed two to the power of forty times; the folders are visited once."""
    Path("tree/inner").mkdir(parents=True)
    write("tree/a.txt", "one")
    write("tree/inner/b.txt", "two")
    for name in ("l1", "l2", "inner/l3"):
        Path("tree", name).symlink_to(Path.cwd() / "tree", target_is_directory=True)
    Path("tree/self").symlink_to("self")
    assert texts("tree/**/*.txt") == ["one", "two"]
    assert texts("tr*/**") == ["one", "two"]
    assert texts("**/inner/*.txt") == ["two"]


def test_long_lines_of_json_are_not_taken_for_text():
    """Whatever the name, and also with characters that some take for line ends."""
    lines = "".join(json.dumps({"text": "x" * 1500}) + "\n" for _ in range(3))
    for name in ("a.txt", "a.log", "a.jsonl.1"):
        assert "format: lines" in failure(name, lines)
    assert texts(write("b.json", '{"text": "a\u2028b"}\n{"text": "c"}\n')) == ["a\u2028b", "c"]


@pytest.mark.parametrize(("suffix", "compress"), [(".bz2", bz2.compress), (".xz", lzma.compress)])
def test_streams_after_damage_are_not_lost(suffix, compress):
    """Several streams are read one after the other; what is no stream is an error."""
    name = f"a.txt{suffix}"
    assert texts(write(name, compress(b"one ") + compress(b"two"))) == ["one two"]
    assert failure(name, compress(b"one ") + b"\x00\x01\x02garbage" + compress(b"two"))
    assert "ended before" in failure(name, compress(b"one " * 1000)[:-8])


@pytest.mark.parametrize(
    ("contents", "part"),
    [
        ({"x.csv": "text,label\nhello,a,\n"}, "write files:"),
        ({"x.parquet": b"PAR1", "y.jsonl": '{"text": "b"}\n'}, "several formats"),
        ({"x.jsonl": '{"text": "b"}\n', "y.txt": "t"}, r"formats \(lines, txt\); write files:"),
        ({"x.parquet": b"PAR1", "y.md": "t"}, r"formats \(md, parquet\); write files:"),
        ({"x.txt": LFS}, "git lfs pull"),
        ({"x.txt": PAGE}, "download"),
        ({"README.md": '---\nconfigs: [{config_name: default, data_files: "../secret.jsonl"}]\n---\n',
          "x.jsonl": '{"text": "b"}\n'}, "outside of the folder"),
    ],
)  # fmt: skip
def test_folders_that_datasets_would_read_wrong_are_refused(contents, part):
    """Its tables shift columns, it reads one format of several, and a card may lead elsewhere."""
    write("secret.jsonl", '{"text": "secret"}\n')
    Path("folder").mkdir()
    for name, content in contents.items():
        write(f"folder/{name}", content)
    with pytest.raises(InputError, match=part):
        texts(dataset="folder")


def test_compressed_tables_say_what_to_do():
    """Parquet is read from its end, which most streams do not have."""
    image_table("tables/a.parquet")
    content = Path("tables/a.parquet").read_bytes()
    assert texts(write("a.parquet.gz", gzip.compress(content, mtime=0))) == ["one one", "two two"]
    assert "unpack it" in failure("a.parquet.zst", zstandard.compress(content))


def test_a_damaged_length_takes_no_memory():
    """An Arrow file that says that its next part has 2 GB is refused before memory for them is set aside."""
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_stream("a.arrow", table.schema) as writer:
        writer.write_table(table)
    data = bytearray(Path("a.arrow").read_bytes())
    data[4:8] = (2**31 - 8).to_bytes(4, "little")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"a\.arrow"):
            texts(write("a.arrow", bytes(data)))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_list_without_end_is_refused_before_memory_for_it_is_taken():
    """The 37 bytes of a Parquet footer whose one part says that it has 999,999 columns would take 680 MB."""
    schema = b"\x19\x2c\x48\x06schema\x15\x02\0" + b"\x15\x0c\x25\0\x18\x04text\x25\0\0"
    footer = b"\x15\x04" + schema + b"\x16\x04" + b"\x19\x1c" + b"\x19\xfc\xbf\x84\x3d"
    assert "size limit" in failure("a.parquet", b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def test_wide_tables_are_read():
    """A footer that is long enough may have any number of columns."""
    table = pyarrow.table({"text": ["one"]} | {str(number): pyarrow.nulls(1) for number in range(12_000)})
    pyarrow.parquet.write_table(table, "a.parquet", store_schema=False, write_statistics=False)
    assert texts("a.parquet") == ["one"]
