"""All settings of a run together, and the checks across sections."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.data import DataConfig
from moe_gpt.config.model import ModelConfig
from moe_gpt.config.parallel import ParallelConfig
from moe_gpt.config.schedule import OptimizerConfig, ScheduleConfig
from moe_gpt.config.section import Problem, Section, unless
from moe_gpt.config.training import CheckpointConfig, FaultConfig, LossConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """All settings of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The shape of the model."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The training data."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    """Sequence length, batch size and learning rate in the course of the run."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Settings of AdamW."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """Weights of the auxiliary losses."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Seed, precision, memory, evaluations and logs of the run."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When checkpoints are saved and which are kept."""
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    """Limits for non-finite steps, loss spikes and unhealthy routers."""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    """How the run is spread over processes."""
    tracking: Literal["none", "tensorboard", "wandb"] = "none"
    """Service that also gets the metrics; tensorboard needs the extra moe_gpt[track], wandb the package wandb."""

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between sections."""
        limits = {
            "model.max_seq_len": self.model.max_seq_len,
            "train.micro_batch_tokens": self.train.micro_batch_tokens,
        }
        stages = self.schedule.stages
        for (index, stage), (limit_key, limit) in itertools.product(enumerate(stages), limits.items()):
            key = f"schedule.stages.{index}.seq_len"
            text = f"{key} must be at most {limit_key}={limit}, got {stage.seq_len}"
            yield from unless(stage.seq_len <= limit, text, key, limit_key)
        key = f"schedule.stages.{len(stages) - 1}.until_tokens"
        text = f"{key} is required when sources have weights, because weights do not set the length of a run"
        yield from unless(stages[-1].until_tokens is not None or not self.data.has_weights, text, key)
