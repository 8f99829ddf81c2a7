"""Where conversations come from: files and datasets give the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from moe_gpt.config import SftConfig
from moe_gpt.config.post_training import ConversationSourceConfig
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.post_training.chat import SPECIAL_TOKENS
from moe_gpt.post_training.sft import prepare_rows

TOKENIZER = train_tokenizer(["What is it? It is this. " * 20], 290, special_tokens=SPECIAL_TOKENS)


def rows_of(folder, **source) -> np.ndarray:
    """Return the ids of a source's rows."""
    sft = SftConfig(row_tokens=64, sources=(ConversationSourceConfig(name="own", **source),))
    rows = prepare_rows(sft, TOKENIZER, folder / "cache", 0.0, lambda text: None)
    return rows.read(np.arange(rows.n_rows))[0]


def write(path, answers) -> None:
    """Write a conversation for each answer."""
    path.parent.mkdir(exist_ok=True)
    turns = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))


@pytest.mark.slow
def test_built_in_sets_are_the_same_in_every_process():
    """Python's hashes of texts are others, and so is the order of its sets."""
    program = (
        "import hashlib, moe_gpt.post_training.builtin_sets as s, moe_gpt.post_training.lines as l, "
        "moe_gpt.post_training.retrieval as r; both = (False, True); print(hashlib.sha256(repr(["
        "[s.builtin_conversations(kind, side, 0.05) for kind in ('calculator', 'functions') for side in both], "
        "[l.line_prompts(side, 0.05) for side in both], r.documented_functions(0.05)]).encode()).hexdigest())"
    )
    run = [sys.executable, "-c", program]
    found = [subprocess.check_output(run, env={**os.environ, "PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    assert found[0] == found[1]
    assert len(found[0].strip()) == 64


def test_a_dataset_gives_the_rows_of_its_file(tmp_path):
    """Both the whole and its beginning."""
    write(tmp_path / "own" / "train.jsonl", ["It is 1.", "This.", "It is it. " * 5])
    from_file = rows_of(tmp_path, files=str(tmp_path / "own" / "train.jsonl"))
    assert np.array_equal(rows_of(tmp_path, dataset=str(tmp_path / "own")), from_file)
    first = rows_of(tmp_path, dataset=str(tmp_path / "own"), max_conversations=1)
    assert len(first) < len(from_file)


def test_a_bad_row_of_a_dataset_is_named(tmp_path):
    """As one of a file is; so is a dataset without the column."""
    write(tmp_path / "own" / "train.jsonl", ["It is 1.", " "])
    with pytest.raises(InputError, match=r"dataset .*own row 2: messages.1.content must be an answer"):
        rows_of(tmp_path, dataset=str(tmp_path / "own"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="messages"):
        rows_of(tmp_path, dataset=str(tmp_path / "other"))
