"""Every setting, checked when it is constructed.

A file for each part of a run; a default is written here and nowhere else; a number that follows from others is a
property. ``section.py`` has the checking, ``yaml.py`` the files and overrides. Read ``model.py`` first.
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
