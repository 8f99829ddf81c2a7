"""The training loop: plan, batch, step; then log, evaluate, save."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

from moe_gpt.train.checkpoint import save_checkpoint
from moe_gpt.train.evaluation import Score
from moe_gpt.train.metrics import MetricsLog
from moe_gpt.train.setup import Run
from moe_gpt.train.step import split_batch, train_step

Outcome = Literal["finished", "max_steps", "max_minutes", "SIGINT", "SIGTERM"]


class Limits(NamedTuple):
    """When to stop before the schedule does; neither changes the schedule."""

    max_steps: int | None = None
    """Stop after this optimizer step, counted from the start of the run."""
    max_minutes: float | None = None
    """Stop after this time, counted from the start of this process's training."""


class Display(Protocol):
    """Who is told what happens."""

    def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
        """Show the newest metrics."""

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Show an evaluation."""


class _StopSignal:
    name: Literal["SIGINT", "SIGTERM"] | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[_StopSignal]:
    """Turn the first SIGINT or SIGTERM into a request to stop; a second SIGINT interrupts at once."""
    stop = _StopSignal()

    def request(number: int, frame: Any) -> None:
        if stop.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = "SIGINT" if number == signal.SIGINT else "SIGTERM"
        os.write(2, b"\nfinishing this step and saving; interrupt again to stop at once\n")  # print may be interrupted

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
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
        OSError: where the run folder cannot be written; earlier checkpoints are intact.
        KeyboardInterrupt: at a second SIGINT.
    """
    state, started_at = run.state, time.monotonic()
    log = MetricsLog(run.run_dir / "metrics.jsonl", state.step if state.step else -1)
    recorder = _Recorder(run, log, display)
    outcome: Outcome | None = _why_stop(run, limits._replace(max_minutes=None), started_at, None)
    with contextlib.closing(log), stop_signals() as stop:
        if state.step == 0:
            recorder.evaluate()
        while outcome is None:
            plan = run.schedule.at(state.tokens_seen)
            batch = run.stream.batch(state.tokens_seen, plan.seq_len, plan.batch_tokens)
            micro_batches = split_batch(batch, run.config.train.micro_batch_tokens, run.device)
            metrics = train_step(state, micro_batches, plan, run.config, run.precision)
            log.add(state.step, state.tokens_seen, plan, metrics)
            outcome = _why_stop(run, limits, started_at, stop.name)
            recorder.after_step(is_last=outcome is not None, is_urgent=outcome in ("SIGINT", "SIGTERM"))
    assert outcome is not None, "the loop ends only with a reason"
    return outcome


def _why_stop(
    run: Run, limits: Limits, started_at: float, signal_name: Literal["SIGINT", "SIGTERM"] | None
) -> Outcome | None:
    if run.is_finished:
        return "finished"
    if signal_name:
        return signal_name
    if limits.max_steps is not None and run.state.step >= limits.max_steps:
        return "max_steps"
    if limits.max_minutes is not None and time.monotonic() - started_at >= 60 * limits.max_minutes:
        return "max_minutes"
    return None


class _Recorder:
    """Does what is due after a step: fetch metrics, evaluate, save."""

    def __init__(self, run: Run, log: MetricsLog, display: Display) -> None:
        self.run, self.log, self.display = run, log, display
        self.group_started_at = time.perf_counter()

    def after_step(self, is_last: bool, is_urgent: bool) -> None:
        config, step = self.run.config, self.run.state.step
        should_save = is_last or _is_due(step, config.checkpoint.every_steps)
        should_evaluate = (is_last and not is_urgent) or _is_due(step, config.train.eval_every_steps)
        if should_save or should_evaluate or _is_due(step, config.train.log_every_steps):
            self.write_metrics()
        if should_evaluate:
            self.evaluate()
        if should_save:
            self.log.sync()
            save_checkpoint(self.run.run_dir, self.run.state, self.run.facts, config.checkpoint.keep_last)
            self.group_started_at = time.perf_counter()

    def write_metrics(self) -> None:
        line = self.log.write_pending(self.group_started_at)
        self.group_started_at = time.perf_counter()
        if line:
            self.display.progress(self.run.state.tokens_seen, line)

    def evaluate(self) -> None:
        state = self.run.state
        scores = self.run.evaluator(state.model, self.run.precision)
        self.log.write_scores(state.step, state.tokens_seen, scores)
        self.display.scores(state.step, scores)
        self.group_started_at = time.perf_counter()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
