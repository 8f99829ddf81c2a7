"""Rows of whole conversations, and the stream of rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moe_gpt.data.batches import keep_documents_apart
from moe_gpt.data.packing import Rows, RowStream, pack, write_rows
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.ops import IGNORED_TARGET
from moe_gpt.post_training.chat import PAD, SPECIAL_TOKENS, mark, render

T = 64


@pytest.fixture(scope="module")
def tokenizer():
    """A small one, grown."""
    return train_tokenizer(["the user asks the assistant\n" * 20], 300).with_special_tokens(SPECIAL_TOKENS)


def said(number: int) -> list[dict]:
    """Return a conversation whose answer tells which one it is."""
    return [{"role": "user", "content": "q" * (number % 5)}, {"role": "assistant", "content": f"n{number}."}]


@pytest.fixture(scope="module")
def rows(tokenizer, tmp_path_factory):
    """Thirty conversations in rows."""
    folder = tmp_path_factory.mktemp("rows") / "rows"
    write_rows(
        folder,
        [render(said(n), tokenizer) for n in range(30)],
        mark(PAD, tokenizer),
        np.dtype(np.uint16),
        T,
        ["a note"],
    )
    return Rows(folder)


@pytest.fixture(scope="module")
def stream(rows, tokenizer):
    """Their stream."""
    return RowStream(rows, mark(PAD, tokenizer), seed=3)


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_conversation_once_and_fills_no_row_beyond_its_end(seed):
    """And no two rows could be one."""
    lengths = [random.Random(seed).randint(1, 50) for _ in range(200)]
    packed = pack(lengths, 50)
    assert sorted(index for row in packed for index in row) == list(range(200))
    sizes = sorted(sum(lengths[index] for index in row) for row in packed)
    assert sizes[-1] <= 50
    assert sizes[0] + sizes[1] > 50


def test_best_fit_takes_the_row_with_least_room():
    """By hand: 6 and 5 open rows of 10; 4 fits the first better, 3 and 2 the second."""
    assert [sorted(row) for row in pack([6, 5, 4, 3, 2], 10)] == [[0, 2], [1, 3, 4]]


def test_every_conversation_is_served_once_in_an_epoch(stream, rows, tokenizer):
    """Whatever the batches, and in another order in the next epoch."""
    orders = []
    for epoch in range(2):
        text, order = "", []
        for row in range(rows.n_rows):
            ids = stream.batch((epoch * rows.n_rows + row) * T, T, T).inputs
            text += tokenizer.decode(ids[0].tolist())
            order.append(stream.locate((epoch * rows.n_rows + row) * T).document)
        assert all(text.count(f"n{number}.") == 1 for number in range(30))
        orders.append(order)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(rows.n_rows))
    assert orders[0] != orders[1]


def test_the_order_follows_from_the_seed_alone(rows, tokenizer):
    """Not from Python's hash, which differs between processes."""
    orders = [[RowStream(rows, 0, seed).locate(row * T).document for row in range(6)] for seed in (0, 1)]
    assert orders == [[3, 9, 7, 1, 8, 5], [3, 1, 9, 2, 4, 0]]


def test_targets_are_the_answers_with_their_ends_and_nothing_else(stream, rows, tokenizer):
    """Also at the places where one conversation of a row ends and the next begins."""
    batch = stream.batch(0, T, rows.n_rows * T)
    learned = batch.targets[batch.targets != IGNORED_TARGET]
    answers = tokenizer.decode(learned.tolist()).split("<|im_end|>")
    assert sorted(answers) == sorted(["", *(f"n{number}." for number in range(30))])
    is_learned = batch.targets[:, :-1] != IGNORED_TARGET
    np.testing.assert_array_equal(batch.targets[:, :-1][is_learned], batch.inputs[:, 1:][is_learned])
    assert (batch.targets[:, -1] == IGNORED_TARGET).all()


def test_the_first_token_of_an_answer_is_a_target_and_the_line_end_after_it_is_not(stream, tokenizer):
    """The place of a target is that of the token before it."""
    batch = stream.batch(0, T, T)
    first = int((batch.targets[0] != IGNORED_TARGET).argmax())
    assert tokenizer.decode(batch.inputs[0, : first + 1].tolist()).endswith("<|im_start|>assistant\n")
    ends = np.flatnonzero(batch.inputs[0] == tokenizer.special_id("<|im_end|>"))
    assert (batch.targets[0, ends] == IGNORED_TARGET).all()


def test_conversations_of_a_row_and_padding_are_documents_of_their_own(stream, tokenizer):
    """No token sees another conversation."""
    import torch

    batch = stream.batch(0, T, T)
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    micro = keep_documents_apart(inputs, targets, mark(PAD, tokenizer))
    texts = [tokenizer.decode(inputs[0, micro.document_ids[0] == n].tolist()) for n in micro.document_ids.unique()]
    assert all(text.count(".<|im_end|>") == 1 or text == "<|pad|>" for text in texts)
    assert (micro.targets == targets).all()
    np.testing.assert_array_equal(batch.is_text, batch.inputs != mark(PAD, tokenizer))


def test_the_parts_of_ranks_are_the_batch(stream):
    """In order."""
    whole = stream.batch(2 * T, T, 5 * T)
    parts = [stream.batch(2 * T, T, 5 * T, rank, 3) for rank in range(3)]
    for whole_array, *arrays in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(whole_array, np.concatenate(arrays))


def test_rows_are_served_whole(stream):
    """Other sequence lengths and places are errors."""
    for arguments in ((0, T // 2, T), (T // 2, T, T)):
        with pytest.raises(ValueError, match="rows of 64 are served whole"):
            stream.batch(*arguments)


def test_damaged_rows_are_an_error(rows, tokenizer, tmp_path):
    """A changed byte of either file is found when it is read; a cut file at once."""
    conversations = [render(said(n), tokenizer) for n in range(3)]
    for name in ("ids.bin", "is_answer.bin"):
        folder = tmp_path / name
        write_rows(folder, conversations, mark(PAD, tokenizer), np.dtype(np.uint16), T, [])
        data = bytearray((folder / name).read_bytes())
        (folder / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(InputError, match="have changed since they were written"):
            Rows(folder).read(np.array([0]))
        (folder / name).write_bytes(data[:-64])
        with pytest.raises(InputError, match="delete that folder to pack again"):
            Rows(folder)
