"""The training stream in closed form: a mixture, epochs and an order that any cut of it agrees with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpt.config import OptimizerConfig, ScheduleConfig, StageConfig
from moe_gpt.data.stream import TrainingStream, permute, validation_rows
from moe_gpt.training.schedule import Schedule

law = settings(max_examples=60, deadline=None, derandomize=True)

N_DOCUMENT = 10
"""Tokens of each document in the texts below."""


class Text(NamedTuple):
    """A stand-in for a token store, whose documents all have the same length."""

    tokens: np.ndarray

    def locate(self, position: int) -> tuple[int, int]:
        """Return document and offset of a position."""
        return divmod(position, N_DOCUMENT)


def numbered(*sizes: int) -> list[Text]:
    """Return texts whose tokens are all different: source i counts up from i x 100,000."""
    return [Text(np.arange(size) + 100_000 * i) for i, size in enumerate(sizes)]


def read(stream: TrainingStream, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of a stretch of the stream, flat."""
    batch = stream.batch(start, 1, length)
    return batch.inputs[:, 0], batch.targets[:, 0]


@law
@given(st.integers(1, 3000), st.integers(0, 2**128 - 1))
def test_permute_is_a_bijection(size, key):
    """Every index below size is hit exactly once, for any size and key."""
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_maps_each_index_alone_as_among_others():
    """What an index maps to does not depend on which others are mapped with it."""
    together = permute(np.arange(1000), 1000, 7)
    assert [permute(np.array([i]), 1000, 7)[0] for i in range(0, 1000, 37)] == together[::37].tolist()


def test_permute_shuffles_differently_by_key():
    """Different keys give different orders, none of them the identity; equal keys give equal ones."""
    orders = [tuple(permute(np.arange(200), 200, key)) for key in (0, 1, 2, 2**100, 0)]
    assert len(set(orders)) == 4
    assert tuple(range(200)) not in orders


def test_permute_spreads_evenly():
    """Over many keys an index goes everywhere about equally often: chi-square over 10 places, false alarm 1 in 10^6."""
    places = [int(permute(np.array([3]), 10, key)[0]) for key in range(3000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 300) ** 2 / 300).sum() < 46.8  # above the quantile of 9 degrees of freedom at 1 - 1e-6


def test_permute_reaches_large_indices():
    """A source of a hundred billion chunks needs no table."""
    size = 10**11
    result = permute(np.array([0, 1, size - 1]), size, 5)
    assert len(set(result.tolist())) == 3
    assert ((result >= 0) & (result < size)).all()


@law
@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**32))
def test_epoch_visits_every_token_once(n_tokens, chunk_tokens, seed):
    """Each pass over a source visits every token exactly once before the next pass begins, whatever the chunk."""
    stream = TrainingStream(numbered(n_tokens), [1.0], seed, chunk_tokens)
    inputs, _ = read(stream, 0, 3 * n_tokens)
    for epoch in inputs.reshape(3, n_tokens):
        assert sorted(epoch) == list(range(n_tokens))


@law
@given(st.lists(st.integers(9, 30), min_size=2, max_size=4), st.integers(1, 8), st.integers(0, 99))
def test_epochs_hold_for_each_source_of_a_mixture(sizes, chunk_tokens, seed):
    """Within a mixture each source's own tokens come in whole passes, too."""
    shares = [1.0 + i for i in range(len(sizes))]
    inputs, _ = read(TrainingStream(numbered(*sizes), shares, seed, chunk_tokens), 0, 640)
    for index, size in enumerate(sizes):
        mine = inputs[inputs // 100_000 == index] - 100_000 * index
        n_epochs = len(mine) // size
        assert n_epochs > 0
        for epoch in mine[: n_epochs * size].reshape(n_epochs, size):
            assert sorted(epoch) == list(range(size))


@law
@given(st.data(), st.integers(0, 10**12))
def test_stream_does_not_depend_on_how_it_is_cut(data, start):
    """Steps of any sequence length and batch size read the same tokens, none skipped, none repeated."""
    stream = TrainingStream(numbered(230, 70), [2.0, 1.0], 3, 8)
    cuts = data.draw(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 8)), min_size=1, max_size=6))
    tokens_seen, inputs, targets = start, [], []
    for seq_len, n_sequences in cuts:
        batch = stream.batch(tokens_seen, seq_len, seq_len * n_sequences)
        assert batch.inputs.shape == batch.targets.shape == (n_sequences, seq_len)
        inputs.append(batch.inputs.ravel())
        targets.append(batch.targets.ravel())
        tokens_seen += seq_len * n_sequences
    whole_inputs, whole_targets = read(stream, start, tokens_seen - start)
    np.testing.assert_array_equal(np.concatenate(inputs), whole_inputs)
    np.testing.assert_array_equal(np.concatenate(targets), whole_targets)


@law
@given(st.data(), st.integers(0, 10**9), st.integers(1, 8), st.integers(1, 20), st.integers(1, 9))
def test_ranks_together_read_what_one_reads(data, start, seq_len, n_sequences, n_ranks):
    """Put together in their order, the ranks' parts are the batch of one process; no two differ by two sequences."""
    sizes = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    stream = TrainingStream(numbered(*sizes), [1.0 + i for i in range(len(sizes))], data.draw(st.integers(0, 99)), 8)
    whole = stream.batch(start, seq_len, seq_len * n_sequences)
    parts = [stream.batch(start, seq_len, seq_len * n_sequences, rank, n_ranks) for rank in range(n_ranks)]
    np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
    np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), whole.targets)
    lengths = [len(part.inputs) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@settings(law, max_examples=25)
@given(st.data(), st.integers(0, 2**32), st.integers(5, 400), st.floats(0.1, 10))
def test_whole_run_reads_each_epoch_once_whatever_its_stages_and_ranks(data, seed, n_tokens, weight):
    """Stages with other lengths, ends, batches, ramps and numbers of ranks leave every pass over every source whole."""
    stages, end = [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        seq_len = data.draw(st.sampled_from([2, 4, 8]))
        end += data.draw(st.integers(8, 480))
        sizes = tuple(seq_len * n for n in data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))))
        stages.append(StageConfig(until_tokens=end, seq_len=seq_len, batch_tokens=sizes))
    schedule = Schedule(ScheduleConfig(stages=tuple(stages)), OptimizerConfig(), 0)
    stream = TrainingStream(numbered(n_tokens, 40), [weight, 1.0], seed, chunk_tokens=8)
    tokens_seen, inputs = 0, []
    while tokens_seen < schedule.total_tokens:
        plan, n_ranks = schedule.at(tokens_seen), data.draw(st.integers(1, 4))
        for rank in range(n_ranks):
            inputs.append(stream.batch(tokens_seen, plan.seq_len, plan.batch_tokens, rank, n_ranks).inputs.ravel())
        tokens_seen += plan.batch_tokens
    seen = np.concatenate(inputs)
    assert len(seen) == schedule.total_tokens > end - stages[-1].seq_len
    for index, size in enumerate((n_tokens, 40)):
        mine = seen[seen // 100_000 == index] - 100_000 * index
        for first in range(0, len(mine), size):
            one_pass = mine[first : first + size]
            assert len(set(one_pass.tolist())) == len(one_pass)


def test_places_before_the_start_are_refused():
    """And batches of nothing."""
    stream = TrainingStream(numbered(10), [1.0], 0, 4)
    for arguments in ((-8, 2, 4), (0, 2, 0), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"starts at token 0|multiple of seq_len=0"):
            stream.batch(*arguments)
    with pytest.raises(ValueError, match="starts at token 0, got -1"):
        stream.locate(-1)


@pytest.mark.parametrize(("rank", "n_ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_rank_outside_the_group_is_refused(rank, n_ranks):
    """Ranks count from 0; the error has both numbers."""
    with pytest.raises(ValueError, match=f"rank must be below n_ranks={n_ranks}, got {rank}"):
        TrainingStream(numbered(10), [1.0], 0, 4).batch(0, 2, 4, rank, n_ranks)


@law
@given(st.lists(st.integers(1, 90), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 10**9))
def test_target_is_the_next_token_of_the_text(sizes, chunk_tokens, start):
    """A target is the token that follows in the source's text, also at the end of a chunk; after the last the first."""
    stream = TrainingStream(numbered(*sizes), [1.0] * len(sizes), 1, chunk_tokens)
    inputs, targets = read(stream, start, 200)
    source, place = inputs // 100_000, inputs % 100_000
    np.testing.assert_array_equal(targets, source * 100_000 + (place + 1) % np.array(sizes)[source])


@law
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 10**12), st.integers(1, 400))
def test_every_window_of_the_mixture_has_its_shares(shares, start, window):
    """In any window each source has its share of the chunks to within as many chunks as there are sources."""
    stream = TrainingStream([Text(np.full(1000, i)) for i in range(len(shares))], shares, 0, chunk_tokens=1)
    counts = np.bincount(read(stream, start, window)[0], minlength=len(shares))
    expected = np.array(shares) / sum(shares) * window
    assert np.abs(counts - expected).max() <= len(shares)
    assert counts.sum() == window


def test_mixture_by_hand():
    """Shares 3 to 1 give every fourth chunk to the second source, and every chunk is of one source."""
    stream = TrainingStream(numbered(64, 64), [3.0, 1.0], 0, chunk_tokens=4)
    source = (read(stream, 0, 64)[0] // 100_000).reshape(-1, 4)
    assert (source == source[:, :1]).all()
    assert source[:, 0].reshape(4, 4).sum(axis=1).tolist() == [1, 1, 1, 1]


def test_shares_need_not_sum_to_one():
    """Only the ratio of the shares matters."""
    streams = [TrainingStream(numbered(64, 64), shares, 0, 4) for shares in ([3.0, 1.0], [0.75, 0.25], [600.0, 200.0])]
    first, *others = [read(stream, 0, 500)[0].tolist() for stream in streams]
    assert others == [first, first]


def test_order_follows_the_seed_alone():
    """Another seed gives another order of the same tokens; the same seed gives the same."""
    orders = [tuple(read(TrainingStream(numbered(200), [1.0], seed, 4), 0, 200)[0]) for seed in (0, 1, 2, 0)]
    assert len(set(orders)) == 3
    assert orders[0] == orders[3]
    assert len({frozenset(order) for order in orders}) == 1


def test_epochs_and_sources_have_orders_of_their_own():
    """Each pass of each source is cut at another place and its chunks are shuffled in another order."""
    inputs, _ = read(TrainingStream(numbered(400, 400), [1.0, 1.0], 0, chunk_tokens=20), 0, 1600)
    passes = [one for i in (0, 1) for one in inputs[inputs // 100_000 == i].reshape(2, 400) - 100_000 * i]
    assert len({one[0] % 20 for one in passes}) == 4
    assert len({tuple((one - one[0]) % 400) for one in passes}) == 4
    assert all((np.diff(one) % 400 != 1).sum() > 12 for one in passes)


@pytest.mark.parametrize("seq_len", [1, 4, 8, 16])
def test_sequence_inside_a_chunk_is_contiguous_text(seq_len):
    """Where chunks are a multiple of the sequence and the text of the chunk, every sequence is a stretch of text."""
    batch = TrainingStream(numbered(320), [1.0], 5, chunk_tokens=16).batch(0, seq_len, 3 * 320)
    assert ((np.diff(batch.inputs, axis=1) % 320) == 1).all()
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


@law
@given(st.integers(20, 300), st.integers(2, 20), st.integers(0, 99))
def test_text_breaks_off_inside_a_chunk_only_where_an_epoch_ends(n_tokens, chunk_tokens, seed):
    """Within a chunk the text runs on, but for the one place where one pass ends and the next begins."""
    stream = TrainingStream(numbered(n_tokens), [1.0], seed, chunk_tokens)
    inputs, targets = read(stream, 0, 4 * n_tokens)
    breaks = np.flatnonzero(inputs[1:] != targets[:-1]) + 1
    assert all(place % chunk_tokens == 0 or place % n_tokens == 0 for place in breaks)


@law
@given(st.integers(0, 10**10), st.integers(1, 12))
def test_locate_agrees_with_batch(token_index, chunk_tokens):
    """The document and offset that locate names hold the token that batch reads there, in the right pass."""
    sizes = (210, 90, 10)
    texts = numbered(*sizes)
    stream = TrainingStream(texts, [1.0, 2.0, 0.5], 9, chunk_tokens)
    where = stream.locate(token_index)
    position = where.document * N_DOCUMENT + where.offset
    assert texts[where.source].tokens[position] == stream.batch(token_index, 1, 1).inputs[0, 0]
    assert 0 <= where.offset < N_DOCUMENT


def test_locate_counts_the_passes():
    """The epoch of a token is the number of whole passes over its source before it."""
    stream = TrainingStream(numbered(30), [1.0], 0, 8)
    assert [stream.locate(i).epoch for i in (0, 29, 30, 59, 60, 300)] == [0, 0, 1, 1, 2, 10]


def test_stream_has_no_state():
    """Reading elsewhere changes nothing: a batch is a function of its arguments."""
    stream = TrainingStream(numbered(230, 70), [2.0, 1.0], 3, 8)
    before = read(stream, 1000, 50)[0].tolist()
    read(stream, 0, 777)
    stream.locate(5)
    assert read(stream, 1000, 50)[0].tolist() == before


def test_batch_is_int64_whatever_the_store_holds():
    """Ids stored in two bytes come out as int64, inputs and targets."""
    stream = TrainingStream([Text(np.arange(50, dtype=np.uint16))], [1.0], 0, 8)
    batch = stream.batch(0, 8, 64)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1.0, 1.0]])
def test_stream_refuses_impossible_shares(shares):
    """Shares are positive, one for each source; the error has their number and the values."""
    with pytest.raises(ValueError, match=r"positive, one for each of 2 sources, got \[1\.0"):
        TrainingStream(numbered(10, 10), shares, 0, 4)


def test_stream_refuses_an_empty_source():
    """A source without tokens is an error."""
    with pytest.raises(ValueError, match="must have tokens"):
        TrainingStream(numbered(10, 0), [1.0, 1.0], 0, 4)


def test_batch_refuses_part_of_a_sequence():
    """A batch is whole sequences; the error has both numbers."""
    with pytest.raises(ValueError, match=r"multiple of seq_len=8, got 20"):
        TrainingStream(numbered(10), [1.0], 0, 4).batch(0, 8, 20)


@pytest.mark.parametrize(
    ("n_tokens", "seq_len", "max_tokens", "inputs"),
    [
        (10, 3, 100, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),  # 9 targets
        (10, 4, 100, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # the ninth target makes no whole sequence
        (10, 3, 7, [[0, 1, 2], [3, 4, 5]]),  # at most 7 tokens
        (5, 8, 100, [[0, 1, 2, 3]]),  # shorter than one sequence
        (100, 8, 5, [[0, 1, 2, 3, 4]]),  # fewer tokens wanted than one sequence has
        (2, 8, 100, [[0]]),
    ],
)
def test_validation_rows_cut_the_start_of_the_text(n_tokens, seq_len, max_tokens, inputs):
    """Held-out text is cut into whole sequences from its start; less than one sequence gives a shorter one."""
    rows = validation_rows(np.arange(n_tokens, dtype=np.uint16), seq_len, max_tokens)
    assert rows.inputs.tolist() == inputs
    assert rows.targets.tolist() == (np.array(inputs) + 1).tolist()
    assert rows.inputs.dtype == rows.targets.dtype == np.int64


def test_validation_rows_are_the_same_text_for_every_length():
    """The curriculum's sequence lengths are evaluated on the same tokens, where they divide them."""
    tokens = np.random.default_rng(0).integers(0, 99, 257)
    rows = [validation_rows(tokens, seq_len, 256).inputs.ravel().tolist() for seq_len in (16, 64, 256)]
    assert rows[0] == rows[1] == rows[2] == tokens[:256].tolist()
