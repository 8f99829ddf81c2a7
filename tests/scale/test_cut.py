"""Parts of a source, in order, are the source."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moe_gpt.config import SourceConfig
from moe_gpt.data import corpus
from moe_gpt.data.corpus import iterate_documents
from moe_gpt.data.document import Document
from moe_gpt.errors import InputError
from moe_gpt.scale.cut import cut_source, read_part

TASKS = (1, 2, 3, 7, 50)


def lines(*texts: str) -> str:
    """Return JSON lines with the texts as they are, not escaped."""
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def parts_of(source: SourceConfig, n_tasks: int) -> list[list[str]]:
    """Return the texts of each part."""
    pieces = cut_source(source, n_tasks)
    return [[document.text for document in read_part(source, pieces, task)] for task in range(n_tasks)]


def check(source: SourceConfig) -> None:
    """Compare the parts for each number of tasks with the documents that one process reads."""
    wanted = [document.text for document in iterate_documents(source)]
    for n_tasks in TASKS:
        assert [text for part in parts_of(source, n_tasks) for text in part] == wanted


WORDS = [f"{number}: Größe 漢字 {'x' * (number * 37 % 90)}" for number in range(60)]


@pytest.mark.parametrize(
    "content",
    [
        lines(*WORDS),
        lines(*WORDS).rstrip("\n"),
        lines(*WORDS).replace("\n", "\r\n"),
        lines(*WORDS).replace("\n", "\r"),
        lines(*WORDS).replace("\n", "\n\n  \n"),
        "\ufeff" + lines(*WORDS),
        lines("", *WORDS, "", "", "end"),
        lines("one"),
    ],
    ids=["plain", "no end", "crlf", "cr", "blank lines", "mark", "empty texts", "one"],
)
def test_json_lines_are_cut_at_lines(content, tmp_path):
    """Each document is read by exactly one task, whatever the ends of lines and the bytes of characters."""
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    check(SourceConfig(name="a", files=str(tmp_path / "*.jsonl")))


def test_files_of_all_kinds_keep_their_order(tmp_path):
    """Cut and whole files, compressed and empty ones, come in the order in which one process reads them."""
    (tmp_path / "a.jsonl").write_text(lines(*WORDS[:20]))
    (tmp_path / "b.csv").write_text("text,n\n" + "".join(f"row {n} of it,{n}\n" for n in range(30)))
    (tmp_path / "c.txt").write_text("a book " * 50)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(*WORDS[20:40]).encode()))
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "f.jsonl").write_text(lines(*WORDS[40:]))
    (tmp_path / "g [1].jsonl").write_text(lines("brackets"))
    check(SourceConfig(name="all", files=str(tmp_path / "*"), min_chars=8))


def test_large_files_are_shared_evenly(tmp_path):
    """No task of four has more than a third of a file of small documents."""
    (tmp_path / "a.jsonl").write_text(lines(*WORDS * 10))
    sizes = [len(part) for part in parts_of(SourceConfig(name="a", files=str(tmp_path / "a.jsonl")), 4)]
    assert min(sizes) > 100
    assert max(sizes) < 200


def test_column_and_template(tmp_path):
    """Parts take the text from the columns that the source names."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"q": "q{n}", "a": {n}}}\n' for n in range(40)))
    check(SourceConfig(name="a", files=str(tmp_path / "a.jsonl"), template="{q}: {a}"))
    check(SourceConfig(name="a", files=str(tmp_path / "a.jsonl"), text_field="q"))


def test_damaged_line_is_named_by_its_place(tmp_path):
    """A task says in which line after which byte the problem is."""
    good = lines(*WORDS)
    (tmp_path / "a.jsonl").write_text(good + "{no json\n", encoding="utf-8")
    source = SourceConfig(name="a", files=str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match=r"a\.jsonl: line \d+ after byte [\d,]+ is not valid JSON"):
        parts_of(source, 3)


def test_byte_that_is_not_utf8_is_named(tmp_path):
    """The position counts from the start of the file, as for one process."""
    content = lines(*WORDS).encode()
    (tmp_path / "a.jsonl").write_bytes(content + b'{"text": "\xff"}\n')
    source = SourceConfig(name="a", files=str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match=f"byte 0xff at position {len(content) + 10}"):
        parts_of(source, 3)


def test_built_in_corpus_is_read_by_the_first_task(monkeypatch):
    """The parts of a built-in source are all of it, then nothing; the merge applies the limits."""
    monkeypatch.setattr(corpus, "iterate_builtin", lambda kind: (Document(f"{kind} {n}", "key") for n in range(9)))
    source = SourceConfig(name="prose", builtin="prose", max_documents=5)
    assert parts_of(source, 3) == [[f"prose {number}" for number in range(9)], [], []]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_dataset_in_a_folder(streaming, tmp_path, monkeypatch):
    """A local dataset is cut into parts that are the whole in order; a streamed one into a part for each file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hugging_face")
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.jsonl").write_text(lines(*WORDS[number * 20 : number * 20 + 20]))
    source = SourceConfig(name="a", dataset=str(tmp_path / "data"), streaming=streaming)
    wanted = [document.text for document in iterate_documents(source)]
    for n_tasks in (1, 2, 5):
        parts = parts_of(source, n_tasks)
        assert [text for part in parts for text in part] == wanted
        assert len(list(filter(None, parts))) == min(n_tasks, 3 if streaming else n_tasks)


def test_saved_dataset(tmp_path):
    """A folder made by save_to_disk is cut into parts."""
    import datasets

    datasets.Dataset.from_dict({"text": WORDS}).save_to_disk(str(tmp_path / "saved"))
    check(SourceConfig(name="a", dataset=str(tmp_path / "saved")))


def test_parquet_files(tmp_path):
    """A Parquet file is read as a whole by one task."""
    import pyarrow
    import pyarrow.parquet

    for number in range(4):
        table = pyarrow.table({"text": WORDS[number * 15 : number * 15 + 15]})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    check(SourceConfig(name="a", files=str(tmp_path / "*.parquet")))
    assert len(list(filter(None, parts_of(SourceConfig(name="a", files=str(Path(tmp_path) / "*.parquet")), 9)))) == 4
