"""Every setting, checked when it is constructed.

Each file has the settings of one part of a run. Every default is written here, once. A number that follows from others
is a property. ``section.py`` checks values; ``yaml.py`` reads files and overrides. Read ``model.py`` first.
"""

from moe_gpt.config.data import DataConfig, SourceConfig, TokenizerConfig
from moe_gpt.config.model import ModelConfig
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
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
]
