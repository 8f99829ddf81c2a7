"""Documents to ids: in their order, the same by any number of processes, and nothing left behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_gpt.data import encode
from moe_gpt.data.document import Document, is_held_out
from moe_gpt.data.encode import Encoder, encode_documents
from moe_gpt.data.fill_in_the_middle import MIDDLE, PREFIX, SUFFIX, FillInTheMiddle
from moe_gpt.data.tokenizer import END_OF_TEXT, in_groups, train_tokenizer
from moe_gpt.errors import InputError

SENTINELS = (PREFIX, MIDDLE, SUFFIX)
TOKENIZER = train_tokenizer(["some words, and more of them\n" * 9], 300, special_tokens=SENTINELS)
DOCUMENTS = [Document(f"document {i} {END_OF_TEXT} caf\u00e9 " + "word " * (i % 40), str(i)) for i in range(300)]


@pytest.fixture
def small_groups(monkeypatch):
    """Groups so small that a few documents occupy several processes."""
    monkeypatch.setattr(encode, "_GROUP_CHARS", 1000)
    monkeypatch.setattr(encode, "_GROUPS_BEFORE_PROCESSES", 2)


def flat(groups) -> list[tuple[list[int], bool]]:
    """Return ids and side of every document."""
    return [(document.ids.tolist(), document.is_held_out) for group in groups for document in group]


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
@pytest.mark.parametrize("processes", [1, 3])
def test_any_number_of_processes_gives_the_same_ids(small_groups, processes, fim_rate):
    """Each document's own ids, in order; text that spells a special token stays text in other processes too."""
    fim, expected = FillInTheMiddle(TOKENIZER, fim_rate, 0.5), []
    for document in DOCUMENTS:
        held_out = is_held_out(document, 0.3)
        rearranged = None if held_out else fim(document.text)
        ids = TOKENIZER.encode(document.text) if rearranged is None else rearranged.tolist()
        expected.append((ids, held_out))
    assert flat(encode_documents(DOCUMENTS, Encoder(TOKENIZER, 0.3, fim_rate), processes)) == expected


def test_little_text_starts_no_processes(monkeypatch):
    """Starting them takes longer than encoding it."""
    monkeypatch.setattr(encode, "_start_pool", None)
    assert len(flat(encode_documents(DOCUMENTS, Encoder(TOKENIZER, 0.3), 4))) == len(DOCUMENTS)


def test_documents_are_read_only_as_far_as_needed(small_groups):
    """A source without end can be encoded up to some point, and closing ends the processes."""
    n_read = itertools.count()
    endless = (Document("words " * 20, str(i)) for i in n_read)
    groups = encode_documents(endless, Encoder(TOKENIZER, 0.3), 2)
    for _ in range(8):
        next(groups)
    assert next(n_read) < 9 * (8 + 2 * 2 + 3)  # nine documents make a group
    groups.close()
    assert multiprocessing.active_children() == []


def test_error_while_reading_ends_the_processes(small_groups):
    """What the reader raises comes through."""

    def broken():
        yield from DOCUMENTS
        raise InputError("unreadable")

    with pytest.raises(InputError, match="unreadable"):
        flat(encode_documents(broken(), Encoder(TOKENIZER, 0.3), 2))
    assert multiprocessing.active_children() == []


def test_error_in_a_process_comes_through(small_groups):
    """As the same type and text."""
    bad = [*DOCUMENTS, Document("half a pair \ud800", "x")]
    with pytest.raises(InputError, match="lone surrogate"):
        flat(encode_documents(bad, Encoder(TOKENIZER, 0.3), 2))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from data.test_encode import *
encode._GROUP_CHARS, encode._GROUPS_BEFORE_PROCESSES = 1000, 2
"""


def test_script_without_a_guard_is_encoded_by_one_process_and_told_why(tmp_path):
    """Its processes would run the script again and again; they end instead."""
    path = tmp_path / "script.py"
    body = "groups = encode_documents(DOCUMENTS, Encoder(TOKENIZER, 0.3), 2)\nprint(len(flat(groups)))\n"
    path.write_text(SCRIPT.format(tests=os.path.dirname(os.path.dirname(__file__))) + body)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120, check=True)
    assert "`if __name__ == '__main__':`" in done.stdout
    assert done.stdout.endswith("300\n")


@pytest.mark.slow
def test_script_without_a_guard_prepares_data_all_the_same(tmp_path):
    """The process that runs it again does not wait for the lock that the first one holds."""
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 300)
    path = tmp_path / "script.py"
    body = """
from moe_gpt.config import DataConfig, SourceConfig, TokenizerConfig
from moe_gpt.data.prepare import prepare_data
config = DataConfig(
    tokenizer=TokenizerConfig(vocab_size=300), cache_dir="cache", processes=2,
    sources=(SourceConfig(name="mine", files="*.txt"),), validation_fraction=0.3,
)
print(len(prepare_data(config).sources[0].train))
"""
    path.write_text(SCRIPT.format(tests=os.path.dirname(os.path.dirname(__file__))) + body)
    command = [sys.executable, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    assert "`if __name__ == '__main__':`" in done.stdout
    assert int(done.stdout.split()[-1]) > 1000


def test_multiprocessing_still_marks_a_process_that_is_starting(tmp_path):
    """``refuse_in_starting_process`` reads the private ``current_process()._inheriting``: True only at the start."""
    path = tmp_path / "script.py"
    path.write_text(
        "import multiprocessing\n"
        "process = multiprocessing.current_process()\n"
        "print(__name__, getattr(process, '_inheriting', 'no mark'), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=print, args=('up',))\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=True)
    assert "__mp_main__ True" in done.stdout, "current_process()._inheriting is gone: see refuse_in_starting_process"
    assert "__main__ no mark" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_killed_process_takes_its_workers_along(tmp_path):
    """SIGKILL leaves no orphans that wait for ever."""
    path = tmp_path / "script.py"
    body = (
        "if __name__ == '__main__':\n"
        "    groups = encode_documents((Document('words ' * 20, str(i)) for i in itertools.count()), "
        "Encoder(TOKENIZER, 0.3), 2)\n"
        "    for index, _ in enumerate(groups):\n"
        "        if index == 9:\n"
        "            print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
    )
    path.write_text(SCRIPT.format(tests=os.path.dirname(os.path.dirname(__file__))) + body)
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = process.stdout.readline().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers  # the second starts when there is work for it
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/fd/0") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tokenizer_survives_pickling():
    """With its rule that text never becomes a special token."""
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode(f"a {END_OF_TEXT} b") == TOKENIZER.encode(f"a {END_OF_TEXT} b")
    assert copy.end_of_text_id == TOKENIZER.end_of_text_id


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_groups_hold_every_item_once(limit):
    """In order; each but the last reaches the limit, and none goes on after it has."""
    sizes = np.random.default_rng(0).integers(0, 5, 50).tolist()
    groups = list(in_groups(sizes, lambda size: size, limit))
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) >= limit > sum(group[:-1]) for group in groups[:-1])
