"""The curriculum and the learning rate as functions of ``tokens_seen``."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpt.config import OptimizerConfig, ScheduleConfig, StageConfig
from moe_gpt.errors import InputError
from moe_gpt.training.schedule import (
    Schedule,
    StepPlan,
    chunk_tokens,
    count_steps,
    estimate_steps,
    fit_schedule,
    rounded_ends,
    tokens_after,
)

law = settings(max_examples=100, deadline=None, derandomize=True)

STAGES = (
    StageConfig(until_tokens=1024, seq_len=64, batch_tokens=256),
    StageConfig(until_tokens=3072, seq_len=128, batch_tokens=(256, 768)),
    StageConfig(until_tokens=5120, seq_len=256, batch_tokens=512),
)


def make_schedule(stages=STAGES, big_epoch_tokens=10**6, lr=1.0, min_lr=0.0, **config) -> Schedule:
    """Build a schedule from a stage table and the learning rate's shape."""
    return Schedule(
        ScheduleConfig(stages=tuple(stages), **config), OptimizerConfig(lr=lr, min_lr=min_lr), big_epoch_tokens
    )


def flat(total: int, **config) -> Schedule:
    """Build a schedule of one stage of one-token steps, for the learning rate."""
    return make_schedule([StageConfig(until_tokens=total, seq_len=1, batch_tokens=1)], **config)


def steps(schedule: Schedule) -> list[tuple[int, StepPlan]]:
    """Return every step of a run: where it starts and its plan."""
    walked, tokens_seen = [], 0
    while tokens_seen < schedule.total_tokens:
        plan = schedule.at(tokens_seen)
        assert plan.batch_tokens > 0, "the walk must advance"
        walked.append((tokens_seen, plan))
        tokens_seen += plan.batch_tokens
    return walked


@pytest.mark.parametrize(
    ("tokens_seen", "seq_len", "batch_tokens"),
    [(0, 64, 256), (960, 64, 64), (1024, 128, 256), (2944, 128, 128), (3072, 256, 512), (4864, 256, 256)],
)
def test_schedule_follows_the_stage_table(tokens_seen, seq_len, batch_tokens):
    """Each stage holds until its end; the step that reaches the end is cut to stop there."""
    assert make_schedule().at(tokens_seen)[:2] == (seq_len, batch_tokens)


@pytest.mark.parametrize(("end", "before", "after"), [(1024, 64, 128), (3072, 128, 256)])
def test_stage_begins_exactly_where_the_previous_one_ends(end, before, after):
    """One sequence before a stage's end the old row holds; at the end and one sequence later the new one."""
    schedule = make_schedule()
    assert [schedule.at(end + offset).seq_len for offset in (-before, 0, after)] == [before, after, after]


@pytest.mark.parametrize(("tokens_seen", "seq_len"), [(1, 63), (1023, 1), (1025, 127), (3073, 255)])
def test_step_between_two_sequences_is_the_rest_of_one(tokens_seen, seq_len):
    """Where a changed table resumes between two multiples of seq_len, one shorter sequence leads to the next."""
    assert make_schedule().at(tokens_seen)[:2] == (seq_len, seq_len)


@pytest.mark.parametrize(
    ("tokens_seen", "batch_tokens"),
    [
        (1024, 256),  # the stage's start: 256
        (1280, 256),  # 256 + 512 / 8 = 320, rounded down to whole sequences of 128
        (1408, 256),  # 352
        (1536, 384),  # 256 + 512 / 4 = 384
        (2048, 512),  # half way
        (2560, 512),  # 256 + 512 x 3/4 = 640, but 512 tokens are left
    ],
)
def test_ramped_batch_grows_linearly_in_whole_sequences(tokens_seen, batch_tokens):
    """A ramp is linear in tokens_seen from the stage's start to its end, rounded down to a multiple of seq_len."""
    assert make_schedule().at(tokens_seen).batch_tokens == batch_tokens


def test_ramp_may_fall():
    """A ramp from a large batch to a small one falls linearly."""
    schedule = make_schedule([StageConfig(until_tokens=1000, seq_len=10, batch_tokens=(200, 100))])
    assert [schedule.at(seen).batch_tokens for seen in (0, 200, 500, 800)] == [200, 180, 150, 120]


stage_tables = st.lists(
    st.tuples(st.integers(1, 16), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4
)


@law
@given(stage_tables)
def test_steps_cover_the_run_exactly_once(rows):
    """Steps are whole sequences within the stage's batch range, stop on every stage's end and at the last token."""
    stages, start = [], 0
    next_seq_lens = [row[0] for row in rows[1:]] + [1]
    for (seq_len, n_units, first, last), next_seq_len in zip(rows, next_seq_lens, strict=True):
        unit = math.lcm(seq_len, next_seq_len)
        start = (start // unit + n_units) * unit
        batch_tokens = (first * seq_len, last * seq_len)
        stages.append(StageConfig(until_tokens=start, seq_len=seq_len, batch_tokens=batch_tokens))
    walked = steps(make_schedule(stages))
    ends = {seen + plan.batch_tokens for seen, plan in walked}
    assert {stage.until_tokens for stage in stages} <= ends
    assert max(ends) == start
    for seen, plan in walked:
        stage = next(stage for stage in stages if seen < stage.until_tokens)
        assert plan.seq_len == stage.seq_len
        assert plan.batch_tokens % plan.seq_len == 0
        assert plan.batch_tokens <= max(stage.batch_range)
        assert plan.batch_tokens >= min(*stage.batch_range, stage.until_tokens - seen)


@law
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 300), st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_any_end_after_a_sequence_is_rounded_to_whole_sequences(rows):
    """A stage loses less than one sequence; only its first may be shorter, and none crosses a chunk of the stream."""
    stages, start = [], 0
    for seq_len, more, first, last in rows:
        batch_tokens = (first * seq_len, last * seq_len)
        stages.append(StageConfig(until_tokens=start + seq_len + more, seq_len=seq_len, batch_tokens=batch_tokens))
        start = stages[-1].end
    schedule, unit = make_schedule(stages), chunk_tokens(stages)
    walked = steps(schedule)
    assert {stage.end for stage in stages} <= {seen + plan.batch_tokens for seen, plan in walked}
    for stage, row in zip(schedule.stages, stages, strict=True):
        assert (stage.end % row.seq_len, stage.end) == (0, row.end)
        assert row.until_tokens - row.seq_len < stage.end <= row.until_tokens
        (first_seen, first_plan), *others = [step for step in walked if stage.start <= step[0] < stage.end]
        assert (first_seen, first_plan.seq_len) == (stage.start, -stage.start % row.seq_len or row.seq_len)
        assert {plan.seq_len for _, plan in others} <= {row.seq_len}
        assert all(plan.batch_tokens <= max(row.batch_range) for _, plan in others)
    for seen, plan in walked:
        assert plan.batch_tokens % plan.seq_len == 0
        begins = range(seen, seen + plan.batch_tokens, plan.seq_len)
        assert all(begin // unit == (begin + plan.seq_len - 1) // unit for begin in begins)


@pytest.mark.parametrize("seq_len", [1, 64, 100, 256, 1000, 2048, 8191])
def test_a_billion_tokens_are_accepted_at_every_sequence_length(seq_len):
    """The end is the last whole sequence, which a note says; a table that has this end needs no note."""
    batch_tokens = 2**16 // seq_len * seq_len
    schedule = make_schedule([StageConfig(until_tokens=1e9, seq_len=seq_len, batch_tokens=batch_tokens)])
    assert schedule.total_tokens == 10**9 - 10**9 % seq_len
    resolved = make_schedule([until(schedule.total_tokens, seq_len)])
    assert resolved.total_tokens == schedule.total_tokens
    assert list(rounded_ends(resolved)) == []
    said = [
        f"stage 0 ends at {schedule.total_tokens:,} tokens",
        f"last whole sequence of {seq_len:,} ",
        "1,000,000,000",
    ]
    notes = list(rounded_ends(schedule))
    assert len(notes) == (10**9 % seq_len > 0)
    assert all(part in note for note in notes for part in said)


def test_stage_that_begins_between_two_of_its_sequences_says_so():
    """64 tokens lead from 320 to the next multiple of 128; the open stage after it is rounded without a word."""
    schedule = make_schedule([until(330, 64), until(700, 128), until(None, 100)], big_epoch_tokens=1050)
    assert [stage.end for stage in schedule.stages] == [320, 640, 1000]
    notes = list(rounded_ends(schedule))
    assert ["stage 0 ends at 320" in notes[0], "stage 1 begins with one sequence of 64 " in notes[1]] == [True, True]
    assert ["stage 1 ends at 640" in notes[2], "stage 2 begins with one sequence of 60 " in notes[3]] == [True, True]
    assert len(notes) == 4
    assert schedule.at(320)[:2] == (64, 64)
    assert schedule.at(384)[:2] == (128, 128)


def test_schedule_that_fits_keeps_its_rounded_ends():
    """Shrinking to as many steps as there are changes no end; to fewer, every stage still ends on whole sequences."""
    config = ScheduleConfig(stages=(until(330, 64), until(2000, 127)))
    schedule = Schedule(config, OptimizerConfig(), 0)
    fitted = fit_schedule(config, OptimizerConfig(), schedule, count_steps(schedule))
    assert [stage.until_tokens for stage in fitted.stages] == [320, 1905]
    shorter = Schedule(fit_schedule(config, OptimizerConfig(), schedule, 9), OptimizerConfig(), 0)
    assert count_steps(shorter) <= 9
    assert all(plan.batch_tokens % plan.seq_len == 0 for _, plan in steps(shorter))


@pytest.mark.parametrize("decay", ["cosine", "wsd", "none"])
def test_warmup_rises_linearly_to_the_peak(decay):
    """During warm-up the learning rate is its peak times the share of the warm-up that has passed."""
    schedule = flat(1000, warmup_tokens=100, decay=decay, lr=2.0, min_lr=0.5)
    assert [schedule.lr_after(tokens) for tokens in (1, 25, 50, 100)] == [0.02, 0.5, 1.0, 2.0]


def test_first_step_learns():
    """The learning rate of a step is that of its last token, so the first step's is above 0."""
    schedule = make_schedule(warmup_tokens=1024, lr=1.0)
    assert schedule.at(0).lr == 256 / 1024
    assert schedule.at(256).lr == 512 / 1024


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [(200, 3.0), (400, 1 + 0.5 * 2 * (1 + math.sqrt(0.5))), (600, 2.0), (1000, 1.0)],
)
def test_cosine_falls_over_all_that_follows_the_warmup(tokens, lr):
    """A quarter, half and all of the way after warm-up the cosine is where it should be."""
    schedule = flat(1000, warmup_tokens=200, decay="cosine", lr=3.0, min_lr=1.0)
    assert schedule.lr_after(tokens) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(("tokens", "lr"), [(100, 3.0), (799, 3.0), (800, 3.0), (850, 2.5), (900, 2.0), (1000, 1.0)])
def test_wsd_is_stable_then_falls_linearly(tokens, lr):
    """Warm-up, stable, decay: the rate stays at its peak and falls linearly over the last share of the tokens."""
    schedule = flat(1000, warmup_tokens=100, decay="wsd", decay_fraction=0.2, lr=3.0, min_lr=1.0)
    assert schedule.lr_after(tokens) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(("tokens", "lr"), [(450, 1.5), (900, 3.0), (950, 2.0), (1000, 1.0)])
def test_wsd_decay_begins_after_the_warmup(tokens, lr):
    """A decay that would begin before the warm-up ends takes what is left instead."""
    schedule = flat(1000, warmup_tokens=900, decay="wsd", decay_fraction=0.5, lr=3.0, min_lr=1.0)
    assert schedule.lr_after(tokens) == pytest.approx(lr, rel=1e-12)


def test_no_decay_stays_at_the_peak():
    """decay: none keeps the peak to the last step."""
    schedule = flat(1000, warmup_tokens=10, decay="none", lr=3.0, min_lr=1.0)
    assert {schedule.at(seen).lr for seen in (9, 10, 500, 999)} == {3.0}


@pytest.mark.parametrize("decay", ["cosine", "wsd"])
@pytest.mark.parametrize("min_lr", [0.0, 3e-5])
def test_last_step_has_exactly_min_lr(decay, min_lr):
    """The learning rate of the last step is min_lr, to the bit."""
    schedule = make_schedule(decay=decay, warmup_tokens=100, lr=3e-3, min_lr=min_lr)
    assert steps(schedule)[-1][1].lr == min_lr


@pytest.mark.parametrize("decay", ["cosine", "wsd", "none"])
@pytest.mark.parametrize("warmup_tokens", [0, 50])
def test_an_only_step_learns(decay, warmup_tokens):
    """It is the first and the last: it has the peak where min_lr is 0. Of two steps, the last still has min_lr."""
    row, shape = StageConfig(until_tokens=100, seq_len=50, batch_tokens=200), {"decay": decay, "lr": 3e-3}
    (only,) = steps(make_schedule([row], warmup_tokens=warmup_tokens, **shape))
    assert only[1].lr == 3e-3
    (only,) = steps(make_schedule([row], min_lr=1e-3, **shape))
    assert only[1].lr == (3e-3 if decay == "none" else 1e-3)
    _, (_, last) = steps(make_schedule([dataclasses.replace(row, batch_tokens=50)], **shape))
    assert last.lr == (3e-3 if decay == "none" else 0)


def test_a_schedule_that_is_fitted_to_one_step_learns():
    """However long it was."""
    config, optimizer = ScheduleConfig(stages=STAGES[:1], warmup_tokens=100), OptimizerConfig(lr=3e-3)
    fitted = fit_schedule(config, optimizer, Schedule(config, optimizer, 0), 1)
    assert [plan.lr for _, plan in steps(Schedule(fitted, optimizer, 0))] == [3e-3]


@law
@given(st.integers(2, 5000), st.data(), st.sampled_from(["cosine", "wsd", "none"]), st.floats(0.01, 1.0))
def test_lr_rises_then_never_rises_again(total, data, decay, fraction):
    """The learning rate rises during warm-up, never rises after it, and stays between 0 and its peak."""
    warmup = data.draw(st.integers(0, total - 1))
    schedule = flat(total, warmup_tokens=warmup, decay=decay, decay_fraction=fraction, lr=1.0, min_lr=0.1)
    rates = [schedule.lr_after(tokens) for tokens in range(1, total + 1)]
    assert all(a < b for a, b in zip(rates[: warmup - 1], rates[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert 0 < min(rates) <= max(rates) <= 1.0


def until(end: int | None, seq_len: int) -> StageConfig:
    """Return a stage of one-sequence steps."""
    return StageConfig(until_tokens=end, seq_len=seq_len, batch_tokens=seq_len)


@pytest.mark.parametrize(
    ("stages", "total"),
    [
        ([until(None, 64)], 15 * 64),
        ([until(None, 125)], 1000),
        ([until(256, 64), until(None, 128)], 256 + 5 * 128),
        ([until(64, 64), until(512, 64), until(None, 256)], 512 + 256),
    ],
)
def test_last_stage_without_an_end_takes_one_big_epoch(stages, total):
    """A null end is the big epoch, rounded down to whole sequences after the stage's start."""
    schedule = make_schedule(stages, big_epoch_tokens=1000)
    last_start, last_plan = steps(schedule)[-1]
    assert schedule.total_tokens == last_start + last_plan.batch_tokens == total


@pytest.mark.parametrize("big_epoch_tokens", [900, 1024, 1151])
def test_data_too_small_for_the_stages_is_refused(big_epoch_tokens):
    """A last stage for which the data leaves no whole sequence is an error with the stage and both counts."""
    with pytest.raises(InputError, match=rf"^schedule\.stages\.1 .*1024 tokens.* {big_epoch_tokens}\b"):
        make_schedule([until(1024, 64), until(None, 128)], big_epoch_tokens)


def test_smallest_data_for_the_stages_is_enough():
    """One whole sequence after the stages before it is a last stage."""
    assert make_schedule([until(1024, 64), until(None, 128)], 1152).total_tokens == 1152


def test_stage_with_an_end_does_not_depend_on_the_data():
    """Where the schedule gives the total, the data's size changes nothing."""
    assert make_schedule(big_epoch_tokens=1).total_tokens == make_schedule(big_epoch_tokens=10**9).total_tokens == 5120


def test_warmup_longer_than_the_data_is_refused():
    """A warm-up that one big epoch does not outlast is an error with both counts."""
    with pytest.raises(InputError, match=r"schedule\.warmup_tokens must be below the run's 960 tokens, got 960"):
        make_schedule([until(None, 64)], big_epoch_tokens=1000, warmup_tokens=960)


@pytest.mark.parametrize("tokens_seen", [-1, 5120, 9999])
def test_schedule_refuses_a_place_outside_the_run(tokens_seen):
    """There is no step before the first or after the last token; the error has the limit and the value."""
    with pytest.raises(ValueError, match=rf"below 5120, got {tokens_seen}"):
        make_schedule().at(tokens_seen)


@pytest.mark.parametrize("batch_tokens", [64, (64, 64), (64, 128), (64, 640)])
def test_steps_are_estimated(batch_tokens):
    """Within a few, which is enough to shrink a schedule that has too many steps to count."""
    schedule = make_schedule([StageConfig(until_tokens=2**16, seq_len=16, batch_tokens=batch_tokens)])
    assert estimate_steps(schedule) == pytest.approx(count_steps(schedule), rel=0.1)


def test_schedule_with_too_many_steps_to_count_shrinks_at_once():
    """And its end is known."""
    table = ScheduleConfig(stages=(until(10**18, 16),), warmup_tokens=0)
    schedule = Schedule(table, OptimizerConfig(), 0)
    fitted = Schedule(fit_schedule(table, OptimizerConfig(), schedule, 50), OptimizerConfig(), 0)
    assert 45 <= count_steps(fitted) <= 50
    assert tokens_after(schedule, 10**18) == schedule.total_tokens
    assert tokens_after(schedule, 2) < 10**6
