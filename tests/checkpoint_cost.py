"""What saving and verifying a checkpoint costs: python tests/checkpoint_cost.py RUN FOLDER.

Loads the newest checkpoint of RUN and saves it five times into FOLDER, which is deleted first and left behind.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import torch

from moe_gpt.training.saving.checkpoint import RunIdentity, load_training_state
from moe_gpt.training.saving.listing import list_checkpoints, verify_checkpoint
from moe_gpt.training.saving.saved_model import open_checkpoint
from moe_gpt.training.saving.store import CheckpointSaver
from moe_gpt.training.setup import build_state


def main(run: str, folder: str) -> None:
    """Print a line for each save."""
    saved = open_checkpoint(run)
    state = build_state(saved.config, torch.device("cpu"))
    load_training_state(state, saved.path)
    shutil.rmtree(folder, ignore_errors=True)
    saver = CheckpointSaver(Path(folder), RunIdentity(saved.config, saved.tokenizer, {}, {}), saved.config.checkpoint)
    for state.step in range(5):
        times = [time.perf_counter()]
        for action in (lambda: saver.save(state), saver.wait, lambda: verify_checkpoint(newest(folder))):
            action()
            times.append(time.perf_counter())
        size = sum(file.stat().st_size for file in newest(folder).iterdir()) / 1e9
        waits, written, verified = (b - a for a, b in zip(times, times[1:], strict=False))
        print(
            f"{size:.3f} GB: training waits {1e3 * waits:.0f} ms, on disk after {waits + written:.2f} s, "
            f"verified in {verified:.2f} s"
        )


def newest(folder: str) -> Path:
    """Return the last checkpoint in a folder."""
    return list_checkpoints(Path(folder))[-1]


if __name__ == "__main__":
    main(*sys.argv[1:])
