"""Prepare a config in three tasks, of which some are killed while they write.

KILL is once (task 1 is killed at its first attempt), always (at each), command (the command is killed in task 2), or
empty. The file RAN gets a line for each task that starts.
"""

import os
import signal
import sys
from pathlib import Path

import yaml

from moe_gpt.config import DataConfig
from moe_gpt.errors import InputError
from moe_gpt.scale import prepare
from moe_gpt.scale.engines import make_engine
from moe_gpt.scale.steps import Tokenise


class DyingTokenise(Tokenise):
    """Notes each task, and dies in its middle where that is asked for."""

    def run(self, data, rank=0, world_size=1):
        """Note the task."""
        ran, kill = Path(os.environ["RAN"]), os.environ["KILL"]
        is_first = not ran.exists() or str(rank) not in ran.read_text().split()
        with open(ran, "a") as file:
            file.write(f"{rank}\n")
        self.dies = rank == 1 and (kill == "always" or (kill == "once" and is_first))
        self.kills_parent = rank == 2 and kill == "command"
        super().run(data, rank, world_size)

    def _encoded(self, data):
        for number, document in enumerate(super()._encoded(data)):
            if number == 5 and self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 5 and self.kills_parent:
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()  # until this process sees that its parent is gone
            yield document


if __name__ == "__main__":
    prepare.Tokenise = DyingTokenise
    engine = make_engine(sys.argv[2], ("workers=1",) if sys.argv[2] == "local" else ())
    try:
        config = DataConfig.from_mapping(yaml.safe_load(Path(sys.argv[1]).read_text()))
        prepare.prepare_at_scale(config, engine, 3, lambda text: None)
    except InputError as error:
        sys.exit(str(error))
