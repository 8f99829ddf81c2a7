"""All settings of a run together, and what two sections can disagree about."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.data import DataConfig
from moe_gpt.config.model import ModelConfig
from moe_gpt.config.schedule import OptimizerConfig, ScheduleConfig
from moe_gpt.config.section import Problem, Section
from moe_gpt.config.training import CheckpointConfig, FaultConfig, LossConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """All settings of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The shape of the model."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """What it reads."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    """The curricula and the learning rate's shape."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """Weights of the auxiliary terms."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Execution."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Saving."""
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    """Numerical faults."""
    tracking: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics are sent besides the run's own files; tensorboard needs moe_gpt[track], wandb the package wandb."""

    def problems(self) -> Iterator[Problem]:
        """Yield what two sections disagree about."""
        for index, stage in enumerate(self.schedule.stages):
            key = f"schedule.stages.{index}.seq_len"
            for limit_key, limit in (
                ("model.max_seq_len", self.model.max_seq_len),
                ("train.micro_batch_tokens", self.train.micro_batch_tokens),
            ):
                if stage.seq_len > limit:
                    yield Problem((key, limit_key), f"{key} must be at most {limit_key}={limit}, got {stage.seq_len}")
        if self.schedule.stages[-1].until_tokens is None and any(source.weight for source in self.data.sources):
            key = f"schedule.stages.{len(self.schedule.stages) - 1}.until_tokens"
            yield Problem((key,), f"{key} is required when sources have weights: only epochs say how long a run is")
