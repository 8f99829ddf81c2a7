"""Everything that a run writes down and says: metrics, events, evaluations, warnings; what it sends to trackers."""

from __future__ import annotations

import contextlib
import datetime
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from moe_gpt.config.yaml import to_plain
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
"""Sequences of a batch whose place in the data is written down when the batch is at fault."""


class RunFolderGone(Exception):  # noqa: N818 (the loop makes an account of it)
    """Somebody removed the folder of the run while it was training."""


class RunLog:
    """A run's files that only grow, its warnings and its trackers."""

    def __init__(self, run: Run, display: Display, callbacks: Sequence[Callback] = ()) -> None:
        self.run, self.state, self.config, self.display = run, run.state, run.config, display
        self.callbacks = Callbacks(run, callbacks)
        self.metrics = MetricsLog(run.run_dir / "metrics.jsonl", run.state.step if run.resumed_from else -1)
        self.events = JsonLines(run.run_dir / "events.jsonl")
        self.spikes = SpikeDetector(run.config.faults)
        self.health = self.watch_from(run.state.step)
        self.tracker = self.track_from(run.state.step if run.resumed_from else None)
        self.cannot_log = False
        self.restart_clock()

    def close(self) -> None:
        """Close the files."""
        self.metrics.close()
        self.events.close()
        self.tracker.close()

    def restart_clock(self) -> None:
        """Count time for the speed of the next steps from now."""
        self.group_started_at = time.perf_counter()

    def rewind(self, step: int) -> None:
        """Forget what came after a step: it is done again."""
        self.metrics.rewind(step)
        self.spikes = SpikeDetector(self.config.faults)
        self.health = self.watch_from(step)
        self.tracker.close()
        self.tracker = self.track_from(step)

    def watch_from(self, step: int) -> HealthWatch:
        """Return a watch that has seen what the run recorded up to this step; what is later is done again."""
        remove_later_evaluations(self.run.run_dir, step)
        health = HealthWatch(self.config)
        list(health.read(read_metrics(self.run.run_dir / "metrics.jsonl")))  # told when they began
        return health

    def track_from(self, resumed_at: int | None) -> Tracker:
        """Open what metrics are sent to; the steps after ``resumed_at`` are done again."""
        settings = to_plain(self.config)
        return open_tracker(self.config.tracking, self.run.run_dir, settings, self.display.warn, resumed_at)

    def record_start(self) -> None:
        """Write down that the run starts or goes on, with what changed and what was damaged."""
        run = self.run
        self.record(
            "resume" if run.resumed_from else "start",
            changes=[change["key"] for change in run.changes],
            damaged=[f"{path.name}: {problem}" for path, problem in run.damaged],
        )
        self.warn_of_missing_metrics()

    def warn_of_missing_metrics(self) -> None:
        """Say where metrics.jsonl has not every step that was done: somebody removed or changed it."""
        lines = read_metrics(self.run.run_dir / "metrics.jsonl")
        found = {line["step"] for line in lines if "loss" in line}
        missing = self.state.step - len(found & set(range(1, self.state.step + 1)))
        if missing:
            text = f"metrics.jsonl lacks {missing:,} of the {self.state.step:,} steps that were done; the run goes on"
            self.warn(Finding("metrics_incomplete", self.state.step, text))

    def fetch(self) -> Fetched:
        """Fetch and write the metrics of the steps since the last time, and note what was wrong with them.

        Raises:
            RunFolderGone: where the run folder is gone.
        """
        fetched = self.metrics.fetch(self.group_started_at)
        self.restart_clock()
        for line in fetched.steps:
            if line["skipped"]:
                self.record_skip(line)
            for finding in self.spikes.read(line):
                self.warn(finding)
        self.write_log()
        return fetched

    def show_and_track(self, fetched: Fetched) -> None:
        """Show, track and judge new metrics."""
        for finding in self.health.read(fetched.records):
            self.warn(finding)
        for line in (*fetched.steps, *fetched.records):
            self.tracker.log(line["step"], tracked_values(line))
        if fetched.steps:
            self.display.progress(self.state.tokens_seen, fetched.steps[-1])

    def write_log(self) -> None:
        """Write the metrics, or keep them where that is not possible now."""
        try:
            self.metrics.write()
        except OSError as error:
            if not self.run.run_dir.is_dir():
                raise RunFolderGone from error
            if not self.cannot_log:
                text = f"metrics cannot be written ({error}); they are kept, and nothing is saved before they are"
                self.warn(Finding("cannot_log", self.state.step, text))
            self.cannot_log = True
        else:
            self.cannot_log = False

    def record_skip(self, line: dict[str, Any]) -> None:
        """Note where the data of a step came from whose loss or gradient was not finite."""
        start, names = line["tokens_seen"] - line["batch_tokens"], [s.config.name for s in self.run.data.sources]
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
            f"step {line['step']}: loss or gradient not finite; the weights stay as they were (its data: events.jsonl)"
        )

    def evaluate(self) -> float | None:
        """Evaluate the model as it is; write, show and track what comes out, with samples and what reports draw.

        Returns:
            the mean validation loss of the sources, None where it is not finite.

        Raises:
            RunFolderGone: where the run folder is gone.
        """
        self.display.evaluating(self.state.step)
        evaluations = self.run.evaluator.evaluate(self.state.model, self.run.precision)
        step, texts = self.state.step, self.sample()
        line = {"step": step, "tokens_seen": self.state.tokens_seen, **score_line(evaluations, texts)}
        self.metrics.append(line)
        self.write_log()
        self.keep_arrays(evaluations)
        scores = {name: found.score for name, found in evaluations.items()}
        self.display.scores(step, scores)
        self.tracker.log(step, tracked_values(line))
        for name, text in texts.items():
            self.tracker.text(step, f"samples/{name}", text)
        self.callbacks.tell("on_evaluation", scores)
        self.restart_clock()
        mean = statistics.fmean(score.ce_loss for score in scores.values())
        return mean if math.isfinite(mean) else None

    def sample(self) -> dict[str, str]:
        """Return a generated text for each source's prompt, unless none is wanted."""
        n_tokens = self.config.train.sample_tokens
        return dict(generate_samples(self.run, n_tokens)) if n_tokens else {}

    def keep_arrays(self, evaluations: dict[str, SourceEvaluation]) -> None:
        """Write what only reports read; where that fails, warn and train on."""
        run, step, n_tokens = self.run, self.state.step, self.config.train.record_tokens
        slices = run.evaluator.slices(n_tokens) if n_tokens else {}
        try:
            gradients = write_evaluation(
                run.run_dir, step, run.state.model, evaluations, slices, run.precision, run.document_end_id
            )
        except OSError as error:
            self.warn(Finding("cannot_record", step, f"evaluation {step} is not kept for reports: {error}"))
            return
        for finding in self.health.read_evaluation(gradients, step):
            self.warn(finding)

    def warn(self, finding: Finding) -> None:
        """Tell a person, and keep it in events.jsonl."""
        self.display.warn(finding.text)
        self.record(finding.kind, step=finding.step, text=finding.text)

    def record(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl; where that cannot be written it is tried again with the next event."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.events.append({"time": now, "kind": kind, "step": self.state.step, **details})
        with contextlib.suppress(OSError):
            self.events.write()
