"""Every setting, checked when a config is constructed.

Each file has the settings of one part of a run. This room alone has defaults. A number that follows from other
settings is a property. ``section.py`` checks values; ``yaml.py`` reads files and overrides. Read ``model.py`` first.
"""

from moe_gpt.config.data import DataConfig, SourceConfig, TokenizerConfig
from moe_gpt.config.model import ModelConfig
from moe_gpt.config.parallel import ParallelConfig
from moe_gpt.config.run import RunConfig
from moe_gpt.config.schedule import OptimizerConfig, ScheduleConfig, StageConfig
from moe_gpt.config.training import CheckpointConfig, FaultConfig, LossConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "FaultConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
]
