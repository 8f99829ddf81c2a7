"""The training loop: plan, batch, step; then log, evaluate, save."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch

from moe_gpt.files.durable import delete_folder
from moe_gpt.training.display import Display
from moe_gpt.training.records.arrays import (
    observe_routing,
)
from moe_gpt.training.records.run_log import Diary, RunFolderGone
from moe_gpt.training.records.watch import Finding, TooManySkips, TrainingStopped, past_skipped
from moe_gpt.training.saving.checkpoint import list_checkpoints, load_training_state
from moe_gpt.training.saving.store import CheckpointSaver, find_checkpoint_to_go_back_to, set_aside
from moe_gpt.training.setup import Run
from moe_gpt.training.step import split_batch, train_step

StopSignalName = Literal["SIGINT", "SIGTERM", "SIGHUP"]
Outcome = Literal["finished", "max_steps", "max_minutes", "SIGINT", "SIGTERM", "SIGHUP"]


class Limits(NamedTuple):
    """When to stop before the schedule does; neither changes the schedule."""

    max_steps: int | None = None
    """Stop after this optimizer step, counted from the start of the run."""
    max_minutes: float | None = None
    """Stop after this time, counted from the start of this process's training."""


class _StopSignal:
    name: StopSignalName | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[_StopSignal]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request to stop; a second SIGINT interrupts at once."""
    stop = _StopSignal()

    def request(number: int, frame: Any) -> None:
        if stop.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = names[number]
        with contextlib.suppress(OSError):  # the terminal may be gone; print may be interrupted
            os.write(2, b"\nfinishing this step and saving; interrupt again to stop at once\n")

    names: dict[int, StopSignalName] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM"}
    if hasattr(signal, "SIGHUP"):  # a terminal was closed
        names[signal.SIGHUP] = "SIGHUP"
    previous = {number: signal.signal(number, request) for number in names}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(run: Run, limits: Limits, display: Display) -> Outcome:
    """Train until the schedule ends, a limit is reached or a signal arrives; save at the end in any case.

    Lines of ``metrics.jsonl`` are on disk before the checkpoint that follows them is complete.

    Returns:
        why it stopped.

    Raises:
        TrainingStopped: where training cannot go on: no memory, no place to save the last step, too many steps that
            were not finite, the run folder gone. It says what is saved.
        KeyboardInterrupt: at a second SIGINT.
    """
    with stop_signals() as stop, contextlib.closing(_Session(run, limits, display)) as session:
        try:
            return session.train(stop)
        except RunFolderGone as error:
            raise TrainingStopped(session.account_of_no_folder()) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingStopped(session.account_of_no_memory(error)) from error


def _why_stop(run: Run, limits: Limits, started_at: float, signal_name: StopSignalName | None) -> Outcome | None:
    if run.is_finished:
        return "finished"
    if signal_name:
        return signal_name
    if limits.max_steps is not None and run.state.step >= limits.max_steps:
        return "max_steps"
    if limits.max_minutes is not None and time.monotonic() - started_at >= 60 * limits.max_minutes:
        return "max_minutes"
    return None


class _Session:
    """A run while this process trains it: what is due after a step, and what to do when something goes wrong."""

    def __init__(self, run: Run, limits: Limits, display: Display) -> None:
        self.run, self.state, self.config, self.limits = run, run.state, run.config, limits
        self.diary = Diary(run, display)
        self.saver = CheckpointSaver(run.run_dir, run.facts, run.config.checkpoint)
        self.started_at = time.monotonic()
        self.has_recorded_save = False

    def close(self) -> None:
        """Close the files."""
        self.diary.close()

    def train(self, stop: _StopSignal) -> Outcome:
        """Step until there is a reason to stop."""
        run = self.run
        self.diary.record(
            "resume" if run.resumed_from else "start",
            changes=[change["key"] for change in run.changes],
            damaged=[f"{path.name}: {problem}" for path, problem in run.damaged],
        )
        self.diary.warn_of_missing_metrics()
        if not run.resumed_from:
            self.evaluate()
        outcome = _why_stop(run, self.limits._replace(max_minutes=None), self.started_at, None)
        while outcome is None:
            try:
                self.step()
                outcome = _why_stop(run, self.limits, self.started_at, stop.name)
                self.after_step(is_last=outcome is not None, is_urgent=outcome in ("SIGINT", "SIGTERM", "SIGHUP"))
            except TooManySkips as skips:
                self.go_back(skips)
                outcome = _why_stop(run, self.limits, self.started_at, stop.name)
                if outcome:
                    self.after_step(is_last=True, is_urgent=outcome != "finished")
        self.warn_of(self.saver.wait)
        return outcome

    def step(self) -> None:
        """Take one optimizer step."""
        run, state = self.run, self.state
        plan = run.schedule.at(state.tokens_seen)
        batch = run.stream.batch(state.tokens_seen, plan.seq_len, plan.batch_tokens)
        end = run.data.tokenizer.end_of_text_id if run.config.data.document_masking else None
        micro_batches = split_batch(batch, run.config.train.micro_batch_tokens, run.device, end)
        should_record = _is_due(state.step + 1, run.config.train.record_every_steps)
        sample = observe_routing(state.model, micro_batches[0], run.precision) if should_record else None
        result = train_step(state, micro_batches, plan, run.config, run.precision, should_record)
        self.diary.log.add(state.step, state.tokens_seen, plan, result, sample)
        state.tokens_seen = past_skipped(state.skipped_windows, state.tokens_seen)

    def after_step(self, is_last: bool, is_urgent: bool) -> None:
        """Fetch metrics, evaluate, save: what is due."""
        config, step = self.config, self.state.step
        should_save = is_last or _is_due(step, config.checkpoint.every_steps)
        should_evaluate = (is_last and not is_urgent) or _is_due(step, config.train.eval_every_steps)
        score = None
        if should_save or should_evaluate or _is_due(step, config.train.log_every_steps):
            self.fetch_metrics()
        if should_evaluate:
            score = self.evaluate()
        if should_save:
            self.save(score, is_last, is_scheduled=_is_due(step, config.checkpoint.every_steps))

    def fetch_metrics(self) -> None:
        """Read what the steps since the last time did.

        Raises:
            TooManySkips: where the run must go back.
            RunFolderGone: where the run folder is gone.
        """
        fetched, failure = self.diary.fetch(), None
        for line in fetched.steps:
            self.state.skips_in_a_row = self.state.skips_in_a_row + 1 if line["skipped"] else 0
            if self.state.skips_in_a_row >= self.config.faults.max_skips_in_a_row and not failure:
                failure = TooManySkips(line["step"], line["tokens_seen"], self.state.skips_in_a_row)
        if failure:
            raise failure
        self.diary.tell(fetched)
        if self.saver.has_failed:
            self.warn_of(self.saver.wait)
        if self.saver.has_saved and not self.has_recorded_save:
            self.diary.record("first_checkpoint")  # says later that there was one
            self.has_recorded_save = True

    def evaluate(self) -> float | None:
        """Score the model; return the mean validation loss of the sources, if it is finite."""
        run = self.run
        examined = run.evaluator.examine(run.state.model, run.precision)
        self.diary.add_evaluation(examined)
        mean = statistics.fmean(found.score.ce_loss for found in examined.values())
        return mean if math.isfinite(mean) else None

    def save(self, score: float | None, is_last: bool, is_scheduled: bool = False) -> None:
        """Save a checkpoint; where that fails, warn and train on, unless it is the last."""
        self.warn_of(self.saver.wait)
        try:
            self.diary.log.sync()
            self.saver.save(self.state, score, wait=is_last, is_scheduled=is_scheduled)
        except OSError as error:
            if is_last:
                raise TrainingStopped(f"step {self.state.step} could not be saved: {error}; {self.saved()}") from error
            self.diary.warn(Finding("cannot_save", self.state.step, f"step {self.state.step} is not saved: {error}"))
        self.diary.restart_clock()

    def go_back(self, skips: TooManySkips) -> None:
        """Return to the last good checkpoint, and pass over all tokens from there to the steps that failed.

        Raises:
            TrainingStopped: where there is none, or the run went back too often.
        """
        state, limit = self.state, self.config.faults.max_rollbacks
        self.warn_of(self.saver.wait)
        place = find_checkpoint_to_go_back_to(self.run.run_dir)
        account = f"{_count(skips.n_steps, 'step')} in a row not finite, up to step {skips.step}"
        advice = "events.jsonl has the data of these steps; try a lower optimizer.lr or optimizer.max_grad_norm"
        abandoned = [path for path in list_checkpoints(self.run.run_dir) if place and path.name > place.name]
        if place is None or state.rollbacks >= limit:
            for path in abandoned:  # saved within the series: a resumed run must not start there
                set_aside(path)
            why = f"the run went back {_count(limit, 'time')}" if place else "there is no good checkpoint to go back to"
            self.diary.record("stopped", reason=account)
            raise TrainingStopped(f"{account}, and {why} (faults.max_rollbacks={limit}); {advice}; {self.saved()}")
        windows, rollbacks = list(state.skipped_windows), state.rollbacks
        for path in abandoned:
            delete_folder(path)
        load_training_state(state, place)
        window = (state.tokens_seen, skips.tokens_seen)
        state.skipped_windows = [w for w in windows if not window[0] <= w[0] < window[1]] + [window]
        state.tokens_seen = past_skipped(state.skipped_windows, state.tokens_seen)
        state.rollbacks, state.skips_in_a_row = rollbacks + 1, 0
        self.diary.rewind(state.step)
        text = f"{account}; back to {place.name}, and on after token {window[1]:,}; {advice}"
        self.diary.warn(Finding("went_back", state.step, text))

    def saved(self) -> str:
        """Say where the run can go on from, once a save in the background is on the disk."""
        self.warn_of(self.saver.wait)
        checkpoints = list_checkpoints(self.run.run_dir)
        return f"the newest checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint"

    def account_of_no_memory(self, error: Exception) -> str:
        """Save what can be saved after memory ran out, and say what to do."""
        state, train = self.state, self.config.train
        account = f"out of memory in step {state.step + 1} ({' '.join(str(error).split())[:200]})"
        advice = f"lower train.micro_batch_tokens (now {train.micro_batch_tokens})"
        if not train.activation_checkpointing:
            advice += " or set train.activation_checkpointing=true"
        if not state.is_updating:  # the weights are those after the last step
            state.optimizer.zero_grad(set_to_none=True)
            with contextlib.suppress(TooManySkips, RunFolderGone):
                self.fetch_metrics()
                self.save(None, is_last=True)
        return f"{account}; {advice}, with --resume and --allow-changes train; {self.saved()}"

    def account_of_no_folder(self) -> str:
        """Save into a new folder after the run's was removed."""
        account = f"{self.run.run_dir} was removed while the run was training; its metrics and checkpoints are gone"
        with contextlib.suppress(OSError):
            self.saver.wait()
        try:
            self.saver.save(self.state, wait=True, is_scheduled=False)
        except OSError as error:
            return f"{account}, and step {self.state.step} could not be saved: {error}"
        return f"{account}; {self.saved()}"

    def warn_of(self, action: Callable[[], None]) -> None:
        """Do something whose failure does not stop the run."""
        try:
            action()
        except OSError as error:
            self.diary.warn(Finding("cannot_save", self.state.step, f"a checkpoint could not be saved: {error}"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    signs = ("can't allocate memory", "out of memory", "could not create a primitive", "could not create a memory")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
