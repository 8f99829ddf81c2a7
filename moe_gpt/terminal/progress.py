"""What a person sees of a run: a summary, a progress bar (or plain lines), evaluations."""

from __future__ import annotations

import datetime
import sys
import time
from typing import Any

from tqdm import tqdm

from moe_gpt.analysis.accounting import ParameterCounts, count_parameters
from moe_gpt.analysis.own_memory import checkpoint_bytes, needed_memory
from moe_gpt.analysis.quantities import format_value
from moe_gpt.analysis.training_cost import stage_tokens, training_flops
from moe_gpt.device import describe_device
from moe_gpt.train.evaluation import Score, format_scores
from moe_gpt.train.setup import Run

_SECONDS_BETWEEN_LINES = 10.0


def describe_run(run: Run) -> str:
    """Return what will be trained: parameters, data, stages, device and precision."""
    model, counts = run.config.model, count_parameters(run.config.model)
    experts = "dense" if model.is_dense else f"{model.n_experts} experts, top-{model.top_k}, balance by {model.balance}"
    lines = [
        f"model      {counts.total:,} parameters, {counts.active:,} active per token; {model.n_layers} layers of "
        f"width {model.d_model}, {model.n_heads} query heads on {model.n_kv_heads} key-value, {experts}",
        f"data       vocabulary {run.data.tokenizer.vocab_size:,}",
    ]
    for source in run.data.sources:
        name = source.config.name
        lines.append(
            f"           {name}: {len(source.train):,} training and {len(source.validation):,} held-out tokens; "
            f"this run passes over it {run.passes[name]:.2f} times"
        )
    big_epoch = sum((source.config.epochs or 1.0) * len(source.train) for source in run.data.sources)
    epochs = "" if any(source.config.weight for source in run.data.sources) else (
        f", {run.schedule.total_tokens / big_epoch:.2f} big epochs"
    )  # fmt: skip
    lines.append(f"schedule   {run.schedule.total_tokens:,} tokens{epochs}")
    for stage in run.schedule.stages:
        first, last = stage.config.batch_range
        batch = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        lines.append(f"           until {stage.end:>12,}: sequences of {stage.config.seq_len}, {batch} tokens a step")
    lines.append(_describe_cost(run, counts))
    lines.append(f"device     {describe_device(run.device)}, {run.precision}")
    lines.append(f"run        {run.run_dir}" + (f", from step {run.state.step}" if run.state.step else ""))
    if run.facts.initialised_from:
        lines.append(f"           started with the weights of {run.facts.initialised_from}")
    return "\n".join(lines)


def _describe_cost(run: Run, counts: ParameterCounts) -> str:
    """Return what the run takes, from its plan; scripts/plan.py says more."""
    flops = training_flops(run.config.model, stage_tokens(run.config.schedule), counts)
    memory = needed_memory(run.config, run.device, run.precision, counts)
    return (
        f"plan       {format_value(flops, 'FLOPs')} in matrix products; training takes {memory.shown()} of memory, "
        f"a checkpoint {format_value(checkpoint_bytes(run.config.model).total, 'bytes')}"
    )


class TerminalDisplay:
    """A progress bar over tokens where stderr is a terminal, otherwise a line now and then."""

    def __init__(self, run: Run) -> None:
        self._run, self._is_terminal = run, sys.stderr.isatty()
        self._scores: dict[str, Score] = {}
        self._pending = ""
        self._started_at = self._line_at = time.monotonic()
        self._started_with: int | None = None
        self._bar = tqdm(
            total=run.schedule.total_tokens,
            initial=run.state.tokens_seen,
            unit=" tokens",
            unit_scale=True,
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )

    def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
        """Show loss and speed."""
        ce_loss = "skipped" if line["ce_loss"] is None else f"{line['ce_loss']:.3f}"
        if self._is_terminal:
            self._bar.set_postfix_str(f"ce_loss {ce_loss}, seq_len {line['seq_len']}", refresh=False)
            self._bar.update(tokens_seen - self._bar.n)
        else:
            self._pending = self._format_line(tokens_seen, ce_loss, line)
            if time.monotonic() - self._line_at >= _SECONDS_BETWEEN_LINES:
                self._print_pending()

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Show an evaluation, after the newest metrics."""
        self._print_pending()
        parts = [f"{name} {s.ce_loss:.3f} ({s.bits_per_byte:.3f} bits per byte)" for name, s in scores.items()]
        self.say(f"validation at step {step}: " + ", ".join(parts))
        self._scores = scores

    def _format_line(self, tokens_seen: int, ce_loss: str, line: dict[str, Any]) -> str:
        if self._started_with in (None, tokens_seen):  # the first line: nothing but its own speed is known
            self._started_at, self._started_with = time.monotonic(), tokens_seen
            speed = line["tokens_per_second"]
        else:
            speed = (tokens_seen - self._started_with) / (time.monotonic() - self._started_at)
        left = datetime.timedelta(seconds=round((self._run.schedule.total_tokens - tokens_seen) / speed))
        return (
            f"step {line['step']}: {tokens_seen:,} tokens, ce_loss {ce_loss}, lr {line['lr']:.2e}, "
            f"{line['batch_tokens']:,} tokens a step in sequences of {line['seq_len']}, "
            f"{line['tokens_per_second']:,.0f} tokens/s, {left} left"
        )

    def _print_pending(self) -> None:
        if self._pending:
            print(self._pending, flush=True)
            self._pending, self._line_at = "", time.monotonic()

    def say(self, text: str) -> None:
        """Print without tearing the bar."""
        if self._is_terminal:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self._print_pending()
        tqdm.write(f"warning: {text}", file=sys.stderr)

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()

    def summary(self) -> str:
        """Return the last evaluation as a table, nothing where there was none."""
        return "\n" + format_scores(self._scores) + "\n" if self._scores else ""
