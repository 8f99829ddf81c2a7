"""The log of a run: metrics, events, evaluations and warnings, on disk, on screen and in trackers."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_gpt.config.yaml import to_plain
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.callbacks import Callback, Callbacks
from moe_gpt.training.display import Display
from moe_gpt.training.evaluation import SourceEvaluation
from moe_gpt.training.records.arrays import remove_later_evaluations, write_evaluation
from moe_gpt.training.records.lines import score_line
from moe_gpt.training.records.metrics import Fetched, JsonLines, MetricsLog, read_metrics
from moe_gpt.training.records.samples import generate_samples
from moe_gpt.training.records.tracking import Tracker, open_tracker, tracked_values
from moe_gpt.training.records.watch import Finding, HealthWatch, SpikeDetector
from moe_gpt.training.setup import Run

_MOST_PLACES = 64
"""Sequences of a non-finite step whose place in the data is recorded; the others are only counted."""


class RunFolderGone(Exception):  # noqa: N818 (recovery turns it into TrainingStopped)
    """Somebody removed the run folder while the run was training."""


class RunLog:
    """The metrics, events, warnings and trackers of a run. Ranks other than 0 keep the same metrics, and write none."""

    def __init__(self, run: Run, display: Display, callbacks: Sequence[Callback] = ()) -> None:
        self.run, self.state, self.config, self.display = run, run.state, run.config, display
        self.callbacks = Callbacks(run, callbacks)
        self.folder = run.run_dir if run.team.is_main else None
        self.metrics = MetricsLog(self.place("metrics.jsonl"), run.state.step if run.resumed_from else -1)
        self.events = JsonLines(self.place("events.jsonl"))
        self.spikes = SpikeDetector(run.config.faults)
        self.health = self.watch_from(run.state.step)
        self.tracker = self.track_from(run.state.step if run.resumed_from else None)
        self.cannot_log = False
        self.restart_clock()

    def place(self, name: str) -> Path:
        """Return where a file of this rank's log is."""
        return self.folder / name if self.folder else Path(os.devnull)

    def close(self) -> None:
        """Close the files and the tracker."""
        self.metrics.close()
        self.events.close()
        self.tracker.close()

    def restart_clock(self) -> None:
        """Measure the speed of the next steps from now on."""
        self.group_started_at, self.group_cpu_at = time.perf_counter(), time.process_time()

    def rewind(self, step: int) -> None:
        """Remove everything after a step, because it is done again."""
        self.metrics.rewind(step)
        self.spikes = SpikeDetector(self.config.faults)
        self.health = self.watch_from(step)
        self.tracker.close()
        self.tracker = self.track_from(step)

    def watch_from(self, step: int) -> HealthWatch:
        """Return a watch that has read the run's records up to this step, and remove later evaluations."""
        health = HealthWatch(self.config)
        if self.folder:
            remove_later_evaluations(self.folder, step)
            list(health.read(read_metrics(self.place("metrics.jsonl"))))  # these warnings were given already
        return health

    def track_from(self, resumed_at: int | None) -> Tracker:
        """Open the run's tracker; steps after ``resumed_at`` are done again."""
        settings, service = to_plain(self.config), self.config.tracking if self.folder else "none"
        return open_tracker(service, self.run.run_dir, settings, self.display.warn, resumed_at)

    def record_start(self) -> None:
        """Record that the run starts or resumes, with changed settings and damaged checkpoints."""
        run = self.run
        self.record(
            "resume" if run.resumed_from else "start",
            total_tokens=run.schedule.total_tokens,
            changes=[change["key"] for change in run.changes],
            damaged=[f"{path.name}: {problem}" for path, problem in run.damaged],
        )
        if self.folder:
            self.warn_of_missing_metrics()

    def warn_of_missing_metrics(self) -> None:
        """Warn if metrics.jsonl lacks completed steps, because somebody removed or changed it."""
        lines = read_metrics(self.place("metrics.jsonl"))
        found = {line["step"] for line in lines if "loss" in line}
        missing = self.state.step - len(found & set(range(1, self.state.step + 1)))
        if missing:
            text = f"metrics.jsonl lacks {missing:,} of the {self.state.step:,} completed steps; the run continues"
            self.warn(Finding("metrics_incomplete", self.state.step, text))

    def fetch(self) -> Fetched:
        """Fetch and write the metrics of the steps since the last call; record skipped steps and loss spikes."""
        fetched = self.metrics.fetch(self.group_started_at, self.group_cpu_at)
        self.restart_clock()
        for line in fetched.steps:
            if line["skipped"]:
                self.record_skip(line)
            for finding in self.spikes.read(line):
                self.warn(finding)
        self.write_log()
        return fetched

    def show_and_track(self, fetched: Fetched) -> None:
        """Show and track new metrics, and warn of unhealthy routers."""
        for finding in self.health.read(fetched.records):
            self.warn(finding)
        for line in (*fetched.steps, *fetched.records):
            self.tracker.log(line["step"], tracked_values(line))
        if fetched.steps:
            self.display.progress(self.state.tokens_seen, fetched.steps[-1])

    def write_log(self) -> None:
        """Write the metrics; if that fails, warn once and keep them for the next time."""
        try:
            self.metrics.write()
        except OSError as error:
            if not self.run.run_dir.is_dir():
                raise RunFolderGone from error
            if not self.cannot_log:
                text = f"metrics cannot be written ({error}); memory keeps them, and checkpoints wait for them"
                self.warn(Finding("cannot_log", self.state.step, text))
            self.cannot_log = True
        else:
            self.cannot_log = False

    def record_skip(self, line: dict[str, Any]) -> None:
        """Record where the data of a non-finite step came from."""
        start, names = line["tokens_seen"] - line["batch_tokens"], self.run.material.names
        starts = range(start, line["tokens_seen"], line["seq_len"])
        places = [self.run.stream.locate(place) for place in starts[:_MOST_PLACES]]
        self.record(
            "non_finite_step",
            step=line["step"],
            tokens=[start, line["tokens_seen"]],
            n_sequences=len(starts),
            sequences=[{**place._asdict(), "source": names[place.source]} for place in places],
        )
        self.display.warn(
            f"step {line['step']}: loss or gradient not finite; the weights are unchanged (events.jsonl has the data)"
        )

    def evaluate(self) -> float | None:
        """Evaluate the model; write, show and track the scores, the samples and the arrays for reports.

        Returns:
            the mean validation loss of the sources; None if it is not finite, or no source has held-out text.
        """
        self.display.evaluating(self.state.step)
        evaluations = self.run.evaluator.evaluate(self.state.model, self.run.precision, self.run.team)
        train, step = self.config.train, self.state.step
        needs_whole = train.sample_tokens or train.record_tokens
        model = self.run.whole_model() if needs_whole else self.state.model if self.folder else None
        texts = self.sample(model) if model else {}
        line = {"step": step, "tokens_seen": self.state.tokens_seen, **score_line(evaluations, texts)}
        self.metrics.append(line)
        self.write_log()
        if model:
            self.keep_arrays(model, evaluations)
        scores = {name: found.score for name, found in evaluations.items()}
        self.display.scores(step, scores)
        self.tracker.log(step, tracked_values(line))
        for name, text in texts.items():
            self.tracker.text(step, f"samples/{name}", text)
        self.callbacks.tell("on_evaluation", scores)
        self.restart_clock()
        return _mean([score.ce_loss for score in scores.values()])

    def sample(self, model: MoEGPT) -> dict[str, str]:
        """Return a generated text for each source's prompt; none if ``train.sample_tokens`` is 0."""
        n_tokens = self.config.train.sample_tokens
        return dict(generate_samples(self.run, n_tokens, model)) if n_tokens else {}

    def keep_arrays(self, model: MoEGPT, evaluations: dict[str, SourceEvaluation]) -> None:
        """Write the arrays for reports; if that fails, warn and go on training."""
        run, step, n_tokens = self.run, self.state.step, self.config.train.record_tokens
        slices = run.evaluator.slices(n_tokens) if n_tokens else {}
        try:
            gradients = write_evaluation(
                run.run_dir, step, model, evaluations, slices, run.precision, run.document_end_id
            )
        except OSError as error:
            self.warn(Finding("cannot_record", step, f"evaluation at step {step} is not recorded: {error}"))
            return
        for finding in self.health.read_evaluation(gradients, step):
            self.warn(finding)

    def warn(self, finding: Finding) -> None:
        """Show a finding, and record it in events.jsonl."""
        self.display.warn(finding.text)
        self.record(finding.kind, step=finding.step, text=finding.text)

    def record(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl; if that fails, the next event tries again."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.events.append({"time": now, "kind": kind, "step": self.state.step, **details})
        with contextlib.suppress(OSError):
            self.events.write()


def _mean(losses: list[float]) -> float | None:
    return statistics.fmean(losses) if losses and all(map(math.isfinite, losses)) else None
