"""What a run does when something goes wrong: non-finite steps, a full disk, no memory, a missing run folder.

A step with a non-finite loss or gradient changes no weights (``train_step``). After several such steps in a row the
run goes back to its last good checkpoint and skips all tokens since then. Going back less far would change nothing,
because the skipped steps left the weights as they were. PaLM (arXiv 2204.02311, section 5.1) did the same manually: it
restarted about 100 steps before a spike and skipped the data around it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from moe_gpt.distributed.process import is_lost_rank
from moe_gpt.files.durable import delete_folder
from moe_gpt.training.records.metrics import Fetched
from moe_gpt.training.records.run_log import RunFolderGone, RunLog
from moe_gpt.training.records.watch import Finding
from moe_gpt.training.saving.checkpoint import load_training_state
from moe_gpt.training.saving.listing import list_checkpoints
from moe_gpt.training.saving.store import CheckpointSaver, find_checkpoint_to_go_back_to, set_aside
from moe_gpt.training.setup import Run


class TrainingStopped(RuntimeError):
    """Training cannot continue. The message has the reason, the newest checkpoint and a remedy. Exit status 3."""


class RankStopped(TrainingStopped):
    """Training cannot continue on this rank, for a reason that the others do not know."""


class TooManySkips(Exception):  # noqa: N818 (the loop catches it; nobody else sees it)
    """Too many non-finite steps in a row; the run must go back."""

    def __init__(self, step: int, tokens_seen: int, n_steps: int) -> None:
        super().__init__(step, tokens_seen, n_steps)
        self.step, self.tokens_seen, self.n_steps = step, tokens_seen, n_steps


def past_skipped(windows: Sequence[tuple[int, int]], tokens_seen: int) -> int:
    """Return the first token at or after ``tokens_seen`` that lies in none of the windows [start, end)."""
    for start, end in sorted(windows):
        if start <= tokens_seen < end:
            tokens_seen = end
    return tokens_seen


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    signs = ("can't allocate memory", "out of memory", "could not create a primitive", "could not create a memory")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


class Recovery:
    """Saves a run. After a fault it restores a good state, or stops and names the newest checkpoint."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self.run, self.state, self.config, self.log = run, run.state, run.config, log
        self.saver = CheckpointSaver(run.run_dir, run.identity, run.config.checkpoint, run.team)
        self._n_told = 0

    def save(self, score: float | None, is_last: bool, is_scheduled: bool = False) -> None:
        """Save a checkpoint. If that fails, warn and continue to train, unless this is the last checkpoint.

        Args:
            score: mean validation loss, if this step was evaluated.
            is_last: wait until the checkpoint is on disk.
            is_scheduled: whether ``checkpoint.every_steps`` asked for it.
        """
        self.wait_for_save()
        try:
            self.saver.save(self.state, score, is_last, is_scheduled, first=self.log.metrics.sync)
        except OSError as error:
            if is_last:
                raise TrainingStopped(f"step {self.state.step} could not be saved: {error}; {self.saved()}") from error
            self._warn("cannot_save", f"step {self.state.step} is not saved: {error}")
        self.look_at_save()
        self.log.restart_clock()

    def wait_for_save(self) -> None:
        """Wait for the save in the background. If it failed, warn."""
        try:
            self.saver.wait()
        except OSError as error:
            self._warn("cannot_save", f"a checkpoint could not be saved: {error}")

    def look_at_save(self) -> None:
        """Warn if the save in the background failed, and tell the callbacks about new checkpoints."""
        if self.saver.has_failed:
            self.wait_for_save()
        new = self.saver.saved[self._n_told :]
        if new and not self._n_told and not self.run.resumed_from:
            self.log.record("first_checkpoint")  # a resume knows by it that checkpoints existed
        self._n_told += len(new)
        for path in new:
            self.log.callbacks.tell("on_save", path)

    def check_skips(self, fetched: Fetched) -> None:
        """Count the non-finite steps in a row, and raise ``TooManySkips`` if the run must go back."""
        failure = None
        for line in fetched.steps:
            self.state.skips_in_a_row = self.state.skips_in_a_row + 1 if line["skipped"] else 0
            if self.state.skips_in_a_row >= self.config.faults.max_skips_in_a_row and not failure:
                failure = TooManySkips(line["step"], line["tokens_seen"], self.state.skips_in_a_row)
        if failure:
            raise failure

    def go_back(self, skips: TooManySkips) -> None:
        """Return to the last good checkpoint and skip the tokens of the failed steps, or raise ``TrainingStopped``."""
        state = self.state
        self.wait_for_save()
        found = self.run.team.from_main(lambda: str(find_checkpoint_to_go_back_to(self.run.run_dir) or ""))
        place = Path(found) if found else None
        account = f"{_count(skips.n_steps, 'step')} in a row had a non-finite loss or gradient, up to step {skips.step}"
        advice = "events.jsonl lists the data of these steps; try a lower optimizer.lr or optimizer.max_grad_norm"
        if place is None or state.rollbacks >= self.config.faults.max_rollbacks:
            raise self._given_up(place, account, advice)
        windows, rollbacks = list(state.skipped_windows), state.rollbacks
        for path in self._later_than(place):
            delete_folder(path)
        load_training_state(state, place)
        window = (state.tokens_seen, skips.tokens_seen)
        state.skipped_windows = [w for w in windows if not window[0] <= w[0] < window[1]] + [window]
        state.tokens_seen = past_skipped(state.skipped_windows, state.tokens_seen)
        state.rollbacks, state.skips_in_a_row = rollbacks + 1, 0
        self.log.rewind(state.step)
        text = f"{account}; the run returned to {place.name} and continues after token {window[1]:,}; {advice}"
        self._warn("went_back", text)

    def _given_up(self, place: Path | None, account: str, advice: str) -> TrainingStopped:
        """Return the error for a run that cannot go back, and set aside the checkpoints of its failed steps."""
        for path in self._later_than(place):  # a resumed run must not start from them
            set_aside(path)
        limit = self.config.faults.max_rollbacks
        why = f"the run returned {_count(limit, 'time')}" if place else "there is no good checkpoint to return to"
        self.log.record("stopped", reason=account)
        return TrainingStopped(f"{account}, and {why} (faults.max_rollbacks={limit}); {advice}; {self.saved()}")

    def _later_than(self, place: Path | None) -> list[Path]:
        checkpoints = list_checkpoints(self.run.run_dir) if self.run.team.is_main else []
        return [path for path in checkpoints if place and path.name > place.name]

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Raise ``TrainingStopped`` when memory runs out, the run folder is gone or another rank does not answer.

        What can be saved is saved before.
        """
        try:
            yield
        except RunFolderGone as error:
            raise TrainingStopped(self._account_of_no_folder()) from error
        except Exception as error:
            if is_out_of_memory(error):
                kind = TrainingStopped if self.run.team.size == 1 else RankStopped
                raise kind(self._account_of_no_memory(error)) from error
            if self.run.team.size > 1 and is_lost_rank(error):
                raise RankStopped(self._account_of_lost_rank(error)) from error
            raise

    def _account_of_no_memory(self, error: Exception) -> str:
        state, train = self.state, self.config.train
        account = f"{self._rank()}out of memory in step {state.step + 1} ({' '.join(str(error).split())[:200]})"
        advice = f"lower train.micro_batch_tokens (now {train.micro_batch_tokens})"
        if not train.activation_checkpointing:
            advice += " or set train.activation_checkpointing=true"
        # the weights are those after the last step; other ranks may be waiting in the middle of theirs
        if not state.is_updating and self.run.team.size == 1:
            state.optimizer.zero_grad()
            with contextlib.suppress(TooManySkips, RunFolderGone):
                self.check_skips(fetched := self.log.fetch())
                self.log.show_and_track(fetched)
                self.save(None, is_last=True)
        return f"{account}; {advice}, with --resume and --allow-changes train; {self.saved()}"

    def _rank(self) -> str:
        return f"rank {self.run.team.rank}: " if self.run.team.size > 1 else ""

    def _account_of_lost_rank(self, error: Exception) -> str:
        account = f"{self._rank()}another rank did not answer in step {self.state.step + 1}"
        return (
            f"{account} ({_first_sentence(error)}); {self._newest()}; --resume continues from it, and torchrun does so "
            "by itself with --max-restarts"
        )

    def _account_of_no_folder(self) -> str:
        account = f"{self.run.run_dir} was removed during training, with its metrics and earlier checkpoints"
        with contextlib.suppress(OSError):
            self.saver.wait()
        if self.run.team.size > 1:  # other ranks are on their way into the next step
            return account
        try:
            self.saver.save(self.state, wait=True, is_scheduled=False)
        except OSError as error:
            return f"{account}, and step {self.state.step} could not be saved: {error}"
        return f"{account}; step {self.state.step} was saved afterwards, and {self.saved()}"

    def saved(self) -> str:
        """Wait for the save in the background, and describe the checkpoint from which the run can resume."""
        self.wait_for_save()
        return self._newest()

    def _newest(self) -> str:
        checkpoints = list_checkpoints(self.run.run_dir)
        return f"the newest checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint"

    def _warn(self, kind: str, text: str) -> None:
        self.log.warn(Finding(kind, self.state.step, text))


def _first_sentence(error: Exception) -> str:
    """Return what an error of a collective says, without the place in PyTorch's source that it begins with."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", " ".join(str(error).split()))
    return text.split(". ")[0][:160]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
