"""Every setting, checked when a config is constructed.

Each file has the settings of one part of a run. This room alone has defaults. A number that follows from other
settings is a property. ``section.py`` checks values; ``yaml.py`` reads files and overrides. Read ``model.py`` first.
"""

from moe_gpt.config.data import DataConfig, SourceConfig, TokenizerConfig
from moe_gpt.config.model import ModelConfig
from moe_gpt.config.mup import MupBase, Scales, scales_of
from moe_gpt.config.parallel import ParallelConfig
from moe_gpt.config.post_training import AdaptersConfig, ConversationSourceConfig, SftConfig
from moe_gpt.config.run import RunConfig
from moe_gpt.config.schedule import OptimizerConfig, ScheduleConfig, StageConfig
from moe_gpt.config.training import CheckpointConfig, FaultConfig, LossConfig, TrainConfig

__all__ = [
    "AdaptersConfig",
    "CheckpointConfig",
    "ConversationSourceConfig",
    "DataConfig",
    "FaultConfig",
    "LossConfig",
    "ModelConfig",
    "MupBase",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "Scales",
    "ScheduleConfig",
    "SftConfig",
    "SourceConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
    "scales_of",
]
