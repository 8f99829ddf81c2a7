"""The training loop: plan, batch, step; then log, evaluate, save.

``recovery.py`` handles what goes wrong.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch

from moe_gpt.data.batches import MicroBatch, deal_batch
from moe_gpt.data.stream import Batch
from moe_gpt.errors import InputError
from moe_gpt.measure.observation import OBSERVED_TOKENS, RoutingSample, observe_routing
from moe_gpt.training.callbacks import Callback
from moe_gpt.training.display import Display
from moe_gpt.training.optimizer import check_optimizer
from moe_gpt.training.records.run_log import RunLog
from moe_gpt.training.recovery import Recovery, TooManySkips, past_skipped
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.setup import Run
from moe_gpt.training.signals import StopRequest, StopSignalName, stop_signals
from moe_gpt.training.stage import Stream
from moe_gpt.training.step import StepResult, train_step

Outcome = Literal["finished", "max_steps", "max_minutes", "callback", "SIGINT", "SIGTERM", "SIGHUP"]
StepFunction = Callable[[Run, StepPlan, bool], StepResult]
"""Takes one optimizer step of a run; the flag asks for a full record of the step."""


class Limits(NamedTuple):
    """When to stop before the schedule ends. The schedule itself stays the same."""

    max_steps: int | None = None
    """Stop after this optimizer step, counted from the start of the run."""
    max_minutes: float | None = None
    """Stop this many minutes after this process began to train."""


def pretraining_step(run: Run, plan: StepPlan, should_record: bool) -> StepResult:
    """Learn to predict the next token of the plan's part of the stream."""
    n_rows = plan.batch_tokens // plan.seq_len
    micro_batches = list(_deal(run, plan, n_rows))
    if run.team.size > 1 and run.config.model.router_noise:  # other noise for each rank, the same after a resume
        stage_and_row = run.team.rank // run.team.layout.tensor
        torch.manual_seed(hash((run.config.train.seed, run.state.step, stage_and_row)))
    sample = _observe(run, plan, n_rows) if should_record else None
    result = train_step(run.state, micro_batches, plan, run.config, run.precision, should_record, run.team)
    return result._replace(sample=sample)


def _deal(run: Run, plan: StepPlan, n_rows: int) -> Iterator[MicroBatch]:
    """Yield this rank's part of each micro-batch of the first rows of a step."""
    stream = cast(Stream, run.stream)

    def read(first: int, n: int, rank: int, n_ranks: int) -> Batch:
        start = run.state.tokens_seen + first * plan.seq_len
        return stream.batch(start, plan.seq_len, n * plan.seq_len, rank, n_ranks)

    return deal_batch(
        n_rows, _rows_per_rank(run, plan), read, run.device, run.stream_end_id,
        run.team.data_rank, run.team.layout.data,
    )  # fmt: skip


def _rows_per_rank(run: Run, plan: StepPlan) -> int:
    """Return how many sequences a rank may hold in a forward pass."""
    return max(1, run.config.train.micro_batch_tokens // plan.seq_len)


def _observe(run: Run, plan: StepPlan, n_rows: int) -> RoutingSample | None:
    """Return what the routers make of a step's first rows, those of all ranks together."""
    team, n_together = run.team, _rows_per_rank(run, plan) * run.team.layout.data
    batch = next(_deal(run, plan, min(n_rows, n_together, max(1, OBSERVED_TOKENS // plan.seq_len))))
    sample = observe_routing(run.state.model, batch, run.precision)
    if sample is None or team.size == 1:
        return sample
    total = RoutingSample(*(team.sum(mean * batch.weight) for mean in sample))
    largest = [logit if batch.weight else -math.inf for logit in sample.largest_logit.tolist()]
    return total._replace(largest_logit=torch.tensor(team.largest(largest)))


def train(
    run: Run,
    limits: Limits,
    display: Display,
    take_step: StepFunction | None = None,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Train until the schedule ends, a limit is reached or a signal arrives, save, and return why training stopped.

    The lines of ``metrics.jsonl`` are on disk before the checkpoint of the same step is complete.

    Args:
        display: shows what happens.
        take_step: your own optimizer step, for another batch or another loss; by default that of the run's stage. On
            several ranks with ZeRO 0 or 1 it must call ``add_over_ranks`` after its last backward pass;
            ``accumulate_gradients`` does.
        callbacks: called as the run goes on; any of them can stop it.

    Raises:
        InputError: if the model has parameters that the optimizer lacks.
        TrainingStopped: if training cannot go on: no memory, no space for the last checkpoint, too many non-finite
            steps, or the run folder is gone. The message says what is saved.
        KeyboardInterrupt: at a second SIGINT.
    """
    take_step = take_step or run.stage.take_step or pretraining_step
    if take_step is not pretraining_step and run.team.layout.pipeline > 1:
        raise InputError(
            f"a step function of your own needs parallel.pipeline=1, got {run.team.layout.pipeline}: no rank has a "
            "whole model"
        )
    check_optimizer(run.state.model, run.state.optimizer)
    with stop_signals() as stop, contextlib.closing(RunLog(run, display, callbacks)) as log:
        recovery = Recovery(run, log)
        with recovery.explaining_failures():
            outcome = _Loop(run, limits, log, recovery, take_step).train(stop)
        log.callbacks.tell("on_end", outcome)
    return outcome


class _Loop:
    """A run while this process trains it."""

    def __init__(self, run: Run, limits: Limits, log: RunLog, recovery: Recovery, take_step: StepFunction) -> None:
        self.run, self.limits, self.log, self.recovery, self.take_step = run, limits, log, recovery, take_step
        self.started_at, self.has_shown = time.monotonic(), False
        self.score: float | None = None

    def train(self, stop: StopRequest) -> Outcome:
        """Step until there is a reason to stop."""
        self.log.record_start()
        if not self.run.resumed_from:
            self.log.evaluate()
        outcome = self.why_stop(self.limits._replace(max_minutes=None), None)  # a resumed run may be at its end
        while outcome is None:
            try:
                self.step()
                outcome = self.why_stop(self.limits, stop.name)
                self.after_step(outcome, is_urgent=outcome in ("SIGINT", "SIGTERM", "SIGHUP"))
                if outcome is None and self.callbacks_want_stop():  # asked for at an evaluation or a save
                    outcome = "callback"
                    self.recovery.save(self.score, is_last=True)
            except TooManySkips as skips:
                self.recovery.go_back(skips)
                outcome = self.why_stop(self.limits, stop.name)
                if outcome:
                    self.after_step(outcome, is_urgent=outcome != "finished")
        self.recovery.wait_for_save()
        self.recovery.look_at_save()
        return outcome

    def step(self) -> None:
        """Take one optimizer step without waiting for the device."""
        state = self.run.state
        plan = self.run.schedule.at(state.tokens_seen)
        should_record = _is_due(state.step + 1, self.run.config.train.record_every_steps)
        result = self.take_step(self.run, plan, should_record)
        self.log.metrics.add(state.step, state.tokens_seen, plan, result)
        self.log.callbacks.tell("on_step", result)
        self.score = None
        state.tokens_seen = past_skipped(state.skipped_windows, state.tokens_seen)

    def after_step(self, outcome: Outcome | None, is_urgent: bool) -> None:
        """Fetch metrics, evaluate and save, each if it is due."""
        config, step, is_last = self.run.config, self.run.state.step, outcome is not None
        is_scheduled = _is_due(step, config.checkpoint.every_steps)
        should_save = is_last or is_scheduled
        should_evaluate = (is_last and not is_urgent) or _is_due(step, config.train.eval_every_steps)
        # the first step is shown at once
        if any((should_save, should_evaluate, not self.has_shown, _is_due(step, config.train.log_every_steps))):
            self.read_metrics()
        if should_evaluate:
            self.score = self.log.evaluate()
        if should_save:
            self.recovery.save(self.score, is_last, is_scheduled)

    def read_metrics(self) -> None:
        """Fetch the metrics of the last steps, check them, and only then show them: a rollback takes steps back."""
        self.has_shown = True
        check_optimizer(self.run.state.model, self.run.state.optimizer)  # parameters may have been made since the start
        fetched = self.log.fetch()
        self.recovery.check_skips(fetched)
        self.log.show_and_track(fetched)
        self.recovery.look_at_save()

    def why_stop(self, limits: Limits, signal_name: StopSignalName | None) -> Outcome | None:
        """Return the reason to stop here, if there is one."""
        minutes = (time.monotonic() - self.started_at) / 60
        signals, team = (None, *get_args(StopSignalName)), self.run.team
        # what only one rank may know: if one stopped alone, the others would wait for it
        signal, callback, is_late = team.largest(
            [signals.index(signal_name), self.log.callbacks.wants_stop, _reached(minutes, limits.max_minutes)]
        )
        reasons: tuple[tuple[bool | int, Outcome | None], ...] = (
            (self.run.is_finished, "finished"),
            (signal, signals[signal]),
            (callback, "callback"),
            (_reached(self.run.state.step, limits.max_steps), "max_steps"),
            (is_late, "max_minutes"),
        )
        return next((reason for holds, reason in reasons if holds), None)

    def callbacks_want_stop(self) -> bool:
        """Return whether a callback of any rank wants to stop."""
        return bool(self.run.team.largest([self.log.callbacks.wants_stop])[0])


def _reached(value: float, limit: float | None) -> bool:
    return limit is not None and value >= limit


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
