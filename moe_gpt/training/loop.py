"""The training loop: plan, batch, step; then log, evaluate, save.

What happens when something goes wrong is ``recovery``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from moe_gpt.data.batches import split_batch
from moe_gpt.measure.observation import observe_routing
from moe_gpt.training.callbacks import Callback
from moe_gpt.training.display import Display
from moe_gpt.training.optimizer import check_optimizer
from moe_gpt.training.records.run_log import RunLog
from moe_gpt.training.recovery import Recovery, TooManySkips, past_skipped
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.setup import Run
from moe_gpt.training.signals import StopRequest, StopSignalName, stop_signals
from moe_gpt.training.step import StepResult, train_step

Outcome = Literal["finished", "max_steps", "max_minutes", "callback", "SIGINT", "SIGTERM", "SIGHUP"]
StepFunction = Callable[[Run, StepPlan, bool], StepResult]
"""Takes one optimizer step on a run; the flag says whether the step is recorded in full."""


class Limits(NamedTuple):
    """When to stop before the schedule does; neither changes the schedule."""

    max_steps: int | None = None
    """Stop after this optimizer step, counted from the start of the run."""
    max_minutes: float | None = None
    """Stop after this time, counted from the start of this process's training."""


def pretraining_step(run: Run, plan: StepPlan, should_record: bool) -> StepResult:
    """Learn to predict the next token of the plan's part of the stream."""
    batch = run.stream.batch(run.state.tokens_seen, plan.seq_len, plan.batch_tokens)
    micro_batches = split_batch(batch, run.config.train.micro_batch_tokens, run.device, run.document_end_id)
    sample = observe_routing(run.state.model, micro_batches[0], run.precision) if should_record else None
    result = train_step(run.state, micro_batches, plan, run.config, run.precision, should_record)
    return result._replace(sample=sample)


def train(
    run: Run,
    limits: Limits,
    display: Display,
    take_step: StepFunction = pretraining_step,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Train until the schedule ends, a limit is reached or a signal arrives; save at the end in any case.

    Lines of ``metrics.jsonl`` are on disk before the checkpoint that follows them is complete.

    Args:
        run: what to train.
        limits: when to stop before the schedule does.
        display: told what happens.
        take_step: what an optimizer step is: another batch, another loss.
        callbacks: told what happens; any of them can stop the run.

    Returns:
        why it stopped.

    Raises:
        InputError: where the model has parameters that the optimizer does not know.
        TrainingStopped: where training cannot go on: no memory, no place to save the last step, too many steps that
            were not finite, the run folder gone. It says what is saved.
        KeyboardInterrupt: at a second SIGINT.
    """
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
            except TooManySkips as skips:
                self.recovery.go_back(skips)
                outcome = self.why_stop(self.limits, stop.name)
                if outcome:
                    self.after_step(outcome, is_urgent=outcome != "finished")
        self.recovery.wait_for_save()
        self.recovery.look_at_save()
        return outcome

    def step(self) -> None:
        """Plan, batch, step; nothing waits for the device."""
        state = self.run.state
        plan = self.run.schedule.at(state.tokens_seen)
        should_record = _is_due(state.step + 1, self.run.config.train.record_every_steps)
        result = self.take_step(self.run, plan, should_record)
        self.log.metrics.add(state.step, state.tokens_seen, plan, result)
        self.log.callbacks.tell("on_step", result)
        state.tokens_seen = past_skipped(state.skipped_windows, state.tokens_seen)

    def after_step(self, outcome: Outcome | None, is_urgent: bool) -> None:
        """Fetch metrics, evaluate, save: what is due."""
        config, step = self.run.config, self.run.state.step
        is_scheduled = _is_due(step, config.checkpoint.every_steps)
        should_save = outcome is not None or is_scheduled
        should_evaluate = (outcome is not None and not is_urgent) or _is_due(step, config.train.eval_every_steps)
        if should_save or should_evaluate or not self.has_shown or _is_due(step, config.train.log_every_steps):
            self.has_shown = True  # the first step is shown at once
            fetched = self.log.fetch()
            self.recovery.check_skips(fetched)  # before they are shown: a run that goes back takes steps back
            self.log.show_and_track(fetched)
            self.recovery.look_at_save()
        score = self.log.evaluate() if should_evaluate else None
        if should_save:
            self.recovery.save(score, is_last=outcome is not None, is_scheduled=is_scheduled)

    def why_stop(self, limits: Limits, signal_name: StopSignalName | None) -> Outcome | None:
        """Return the reason to stop here, if there is one."""
        if self.run.is_finished:
            return "finished"
        if signal_name:
            return signal_name
        if self.log.callbacks.wants_stop:
            return "callback"
        if limits.max_steps is not None and self.run.state.step >= limits.max_steps:
            return "max_steps"
        if limits.max_minutes is not None and time.monotonic() - self.started_at >= 60 * limits.max_minutes:
            return "max_minutes"
        return None


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
