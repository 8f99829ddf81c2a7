"""Preparation in tasks gives the bytes of plain preparation, whatever the engine, the tasks, and what dies."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from scale.corpora import config_of, sentences, stores, write_corpus, write_lines

from moe_gpt.config import DataConfig, SourceConfig
from moe_gpt.data.prepare import prepare_data
from moe_gpt.errors import InputError

pytest.importorskip("datatrove", reason="needs moe_gpt[scale]")

from moe_gpt.scale import engines, prepare  # noqa: E402
from moe_gpt.scale.engines import make_engine  # noqa: E402
from moe_gpt.scale.prepare import Prepared, prepare_at_scale  # noqa: E402

WORKER = Path(__file__).parent / "killable.py"


@pytest.fixture
def here(monkeypatch):
    """Let the local engine run its tasks one after the other in this process, which is quick."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def run(executor):
        for task in executor.get_incomplete_ranks():
            copy.deepcopy(executor)._run_for_rank(task)

    monkeypatch.setattr(engines.ProcessExecutor, "run", run)


def scaled(config: DataConfig, n_tasks: int, engine: str = "local", say=lambda _: None) -> Prepared:
    """Prepare with an engine."""
    return prepare_at_scale(config, make_engine(engine, ()), n_tasks, say)


def plain(config: DataConfig) -> None:
    """Prepare in one process."""
    prepare_data(config, say=lambda _: None)


def check(sources: tuple[SourceConfig, ...], folder: Path, tasks: tuple[int, ...], **keys) -> list[Prepared]:
    """Compare the stores of several numbers of tasks with those of one process."""
    plain(config_of(sources, folder / "plain", **keys))
    found = [scaled(config_of(sources, folder / f"scaled-{n_tasks}", **keys), n_tasks) for n_tasks in tasks]
    for n_tasks in tasks:
        assert stores(folder / f"scaled-{n_tasks}") == stores(folder / "plain")
    return found


@pytest.mark.parametrize(
    ("fraction", "tasks"),
    [(0.0, (1, 5)), (0.1, (3,)), pytest.param(0.1, (2, 130), marks=pytest.mark.slow)],
)
def test_the_store_does_not_depend_on_tasks(fraction, tasks, here, tmp_path):
    """One task, few, and more than documents give the bytes of one process, and count the same documents."""
    found = check(write_corpus(tmp_path), tmp_path, tasks, validation_fraction=fraction)
    for prepared in found:
        lines, book = prepared.summaries
        assert (lines.n_read, lines.removed, lines.n_documents) == (83, {"exact repeats": 3}, 80)
        assert (book.n_read, book.n_documents) == (1, 1)


@pytest.mark.slow
def test_in_processes(tmp_path):
    """Tasks in processes of their own give the same bytes; the folder of parts is gone afterwards."""
    said = []
    sources = write_corpus(tmp_path)[:1]
    plain(config_of(sources, tmp_path / "plain"))
    scaled(config_of(sources, tmp_path / "scaled"), 2, say=said.append)
    assert stores(tmp_path / "scaled") == stores(tmp_path / "plain")
    assert "tokenising lines: 2 tasks, engine local" in said
    assert [path.suffix for path in (tmp_path / "scaled" / "scale").iterdir()] == [".json"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_engines(engine, n_tasks, tmp_path):
    """Each engine gives the bytes of one process."""
    if engine == "ray":
        pytest.importorskip("ray")
    sources = write_corpus(tmp_path)
    plain(config_of(sources, tmp_path / "plain"))
    scaled(config_of(sources, tmp_path / "scaled"), n_tasks, engine)
    assert stores(tmp_path / "scaled") == stores(tmp_path / "plain")


@pytest.mark.parametrize(
    "limits", [{"max_documents": 17}, {"part": 0.3}, {"max_tokens": 700}, {"max_tokens": 300, "fim_rate": 0.5}]
)
def test_limits_and_rearranged_documents(limits, here, tmp_path):
    """Limits cut where one process stops, and fill-in-the-middle rearranges the same documents."""
    write_lines(tmp_path / "a.jsonl", [sentences(2, n) for n in range(60)])
    source = SourceConfig(name="a", files=str(tmp_path / "a.jsonl"), **limits)
    tokens = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    tokenizer = {"vocab_size": 280, "special_tokens": tokens}
    for name, run in (("plain", plain), ("scaled", lambda config: scaled(config, 4))):
        run(DataConfig(tokenizer=tokenizer, sources=(source,), cache_dir=str(tmp_path / name), validation_fraction=0.1))
    assert stores(tmp_path / "scaled") == stores(tmp_path / "plain")


def test_a_built_store_is_used(here, tmp_path, monkeypatch):
    """A second call runs no task, and shows the summary again; plain preparation finds the store, too."""
    config = config_of(write_corpus(tmp_path), tmp_path / "cache")
    first = scaled(config, 3)
    monkeypatch.setattr(prepare, "_build", lambda *_: pytest.fail("built again"))
    assert scaled(config, 2).summaries == first.summaries
    said = []
    prepare_data(config, say=said.append)
    assert not [text for text in said if text.startswith("tokenising")]


FILTERED = {"gopher_quality": {"min_doc_words": 12, "min_stop_words": 1}, "regex": {"regex_exp": "SECRET"}}


@pytest.mark.parametrize("n_tasks", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_filters_and_near_duplicates(n_tasks, here, tmp_path):
    """Each filter and MinHash remove the documents made for it, and the summary counts them."""
    pytest.importorskip("spacy")
    good = [sentences(6, n) for n in range(20)]
    nearly = [f"{good[n]} And so it ends." for n in (2, 9)]
    write_lines(tmp_path / "a.jsonl", [*good, "Too short.", f"{good[0]} SECRET", *nearly, f"SECRET {good[1]}"])
    source = SourceConfig(name="a", files=str(tmp_path / "a.jsonl"))
    keys = {"filters": FILTERED, "near_duplicates": {"remove": True}, "validation_fraction": 0.0}
    config = config_of((source,), tmp_path / "cache", **keys)
    prepared = scaled(config, n_tasks)
    (summary,) = prepared.summaries
    assert summary.n_read == 25
    assert summary.removed == {"gopher_quality": 1, "regex": 2, "near duplicates": 2}
    assert summary.n_documents == 20
    (tokens,) = prepare_data(config, prepared.tokenizer).sources
    texts = prepared.tokenizer.decode(tokens.train.tokens[:].tolist()).split("<|endoftext|>")[:-1]
    assert [text.removesuffix(" And so it ends.") for text in texts if text not in nearly] == [
        text for text in good if text in texts
    ]
    assert len(texts) == 20
    assert not [text for text in texts if "SECRET" in text or "short" in text]
    assert "near duplicates" in summary.table()


@pytest.mark.slow
def test_cleaned_stores_do_not_depend_on_tasks(here, tmp_path):
    """With filters and MinHash, too, the bytes are the same for each number of tasks."""
    pytest.importorskip("spacy")
    texts = [sentences(3 + n % 3, n % 17) + (" Or not." if n > 25 else "") for n in range(40)]
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "b.jsonl", texts[::-1] + ["tiny"])
    source = SourceConfig(name="a", files=str(tmp_path / "*.jsonl"))
    keys = {"filters": FILTERED, "near_duplicates": {"remove": True}}
    for n_tasks in (1, 3):
        scaled(config_of((source,), tmp_path / str(n_tasks), **keys), n_tasks)
        assert stores(tmp_path / str(n_tasks)) == stores(tmp_path / "1")


def test_a_changed_text_decides_its_side(here, tmp_path):
    """A filter may change a document; equal results of different documents are on the same side."""
    pytest.importorskip("spacy")
    body = "\n".join(f"Here is line {n} of a text that ends with a full stop." for n in range(8))
    write_lines(tmp_path / "a.jsonl", [f"{body}\nno end {n}" for n in range(30)])
    source = SourceConfig(name="a", files=str(tmp_path / "a.jsonl"), deduplicate=True)
    keys = {"filters": {"c4_quality": {}}, "validation_fraction": 0.5}
    (summary,) = scaled(config_of((source,), tmp_path / "cache", **keys), 3).summaries
    assert summary.removed == {"c4_quality": 0, "exact repeats": 29}


def test_plain_preparation_refuses_filters(tmp_path):
    """Without an engine, filters and MinHash are an error that says what to do."""
    for keys in ({"filters": FILTERED}, {"near_duplicates": {"remove": True}}):
        with pytest.raises(InputError, match="need datatrove; run moe-gpt prepare .* --engine local first"):
            plain(config_of(write_corpus(tmp_path), tmp_path / "cache", **keys))


def test_cleaning_is_part_of_the_stores_name(tmp_path):
    """Each filter, each setting, their order, and each setting of MinHash give another store."""
    (source, _), names = write_corpus(tmp_path), set()
    tokenizer = prepare_data(config_of((source,), tmp_path / "cache")).tokenizer
    settings = [
        {},
        {"filters": {"regex": {"regex_exp": "a"}}},
        {"filters": {"regex": {"regex_exp": "b"}}},
        {"filters": {"regex": {"regex_exp": "b"}, "gopher_quality": {}}},
        {"filters": {"gopher_quality": {}, "regex": {"regex_exp": "b"}}},
        {"near_duplicates": {"remove": True}},
        {"near_duplicates": {"remove": True, "n_grams": 3}},
    ]
    for keys in settings:
        names.add(prepare.store_folder(source, config_of((source,), tmp_path, **keys), tokenizer, tmp_path).name)
    assert len(names) == len(settings)
    off = config_of((source,), tmp_path, near_duplicates={"n_grams": 3})
    assert prepare.store_folder(source, off, tokenizer, tmp_path).name in names


def test_filter_settings_of_another_kind_are_refused():
    """Datatrove itself fails in the first task, with an error that does not name the setting."""
    from moe_gpt.scale.steps import make_filters

    assert len(make_filters({"gopher_quality": {"min_doc_words": None, "max_non_alpha_words_ratio": 1}})) == 1
    with pytest.raises(InputError, match=r"data\.filters\.gopher_quality\.min_doc_words must be like 50.*got 'x'"):
        make_filters({"gopher_quality": {"min_doc_words": "x"}})


@pytest.mark.slow
def test_what_a_task_cannot_read_is_said(tmp_path):
    """The error of a task in another process is the error of the command; the tasks before it are kept."""
    write_lines(tmp_path / "a.jsonl", ["fine text"] * 50)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{no json\n")
    config = config_of((SourceConfig(name="a", files=str(tmp_path / "a.jsonl")),), tmp_path / "cache")
    config = config_with_tokenizer(config, tmp_path)
    with pytest.raises(InputError, match=r"a\.jsonl: line \d+ after byte \d+ is not valid JSON"):
        scaled(config, 2)


def config_with_tokenizer(config: DataConfig, folder: Path) -> DataConfig:
    """Return the config with a tokenizer from a file, which needs no text."""
    import dataclasses

    from moe_gpt.config import TokenizerConfig
    from moe_gpt.data.tokenizer import train_tokenizer

    (folder / "tokenizer.json").write_text(train_tokenizer(["some text"], 260).to_json())
    return dataclasses.replace(config, tokenizer=TokenizerConfig(file=str(folder / "tokenizer.json")))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_killed_task_alone_is_run_again(engine, tmp_path):
    """A task whose process is killed is run again by itself, and the bytes are the same."""
    if engine == "ray":
        pytest.importorskip("ray")
    assert sorted(run_killable(tmp_path, "once", engine)) == [0, 1, 1, 2]


@pytest.mark.slow
def test_after_a_killed_command_only_unfinished_tasks_run(tmp_path):
    """The command is killed in the middle of task 2; the same command runs that task alone."""
    assert run_killable(tmp_path, "command") == [0, 1, 2, 2]


@pytest.mark.slow
def test_a_task_that_always_dies_is_named(tmp_path):
    """After some attempts the command says which log to read; the next call runs this task alone."""
    assert run_killable(tmp_path, "always") == [0, 1, 1, 1, 2, 1]


def run_killable(folder: Path, kill: str, engine: str = "local") -> list[int]:
    """Prepare with tasks that are killed, then without; return the tasks that ran, and compare the bytes."""
    sources = write_corpus(folder)[:1]
    plain(config_of(sources, folder / "plain"))
    values = {"sources": [{"name": "lines", "files": str(folder / "lines" / "*"), "deduplicate": True}]}
    values |= {"tokenizer": {"vocab_size": 280}, "cache_dir": str(folder / "scaled"), "validation_fraction": 0.1}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "KILL": kill, "RAN": str(folder / "ran")}
    words = [sys.executable, str(WORKER), str(folder / "config.yaml"), engine]
    first = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (first.returncode == 0) == (kill == "once"), first.stderr
    if kill == "always":
        assert "1 of 3 tasks did not finish" in first.stderr
    if kill == "command":
        assert first.returncode == -signal.SIGKILL
    if kill != "once":
        again = subprocess.run(words, env={**environment, "KILL": ""}, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
    assert stores(folder / "scaled") == stores(folder / "plain")
    return [int(line) for line in (folder / "ran").read_text().split()]


@pytest.mark.slow
def test_two_commands_at_once(tmp_path):
    """The second waits for the first, and finds its store."""
    sources = write_corpus(tmp_path)[:1]
    plain(config_of(sources, tmp_path / "plain"))
    values = {"data": {"sources": [{"name": "lines", "files": str(tmp_path / "lines" / "*"), "deduplicate": True}]}}
    values["data"] |= {"tokenizer": {"vocab_size": 280}, "cache_dir": str(tmp_path / "scaled")}
    values["data"]["validation_fraction"] = 0.1
    values["schedule"] = {"stages": [{"until_tokens": 1024, "seq_len": 64, "batch_tokens": 128}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    options = ["--engine", "local", "--tasks", "2"]
    words = [sys.executable, "-m", "moe_gpt", "prepare", str(tmp_path / "run.yaml"), *options]
    commands = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [command.communicate()[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0]
    assert sorted("waiting for another process" in answer for answer in answers) == [False, True]
    assert stores(tmp_path / "scaled") == stores(tmp_path / "plain")
