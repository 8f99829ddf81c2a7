"""All settings of a run together, and the checks across sections."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.data import DataConfig
from moe_gpt.config.model import ModelConfig
from moe_gpt.config.parallel import ParallelConfig
from moe_gpt.config.post_training import AdaptersConfig, DpoConfig, RewardConfig, RlConfig, SftConfig
from moe_gpt.config.schedule import OptimizerConfig, ScheduleConfig
from moe_gpt.config.section import Problem, Section, unless
from moe_gpt.config.training import CheckpointConfig, FaultConfig, LossConfig, TrainConfig
from moe_gpt.config.vision import SeeConfig

STAGES = ("sft", "reward", "dpo", "rl", "see")
"""The sections of the stages after pre-training; a run is at most one of them."""


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
    sft: SftConfig | None = None
    """Supervised fine-tuning on conversations (moe-gpt finetune)."""
    reward: RewardConfig | None = None
    """A reward model from pairs of answers (moe-gpt finetune)."""
    dpo: DpoConfig | None = None
    """Direct preference optimisation on pairs of answers (moe-gpt finetune)."""
    rl: RlConfig | None = None
    """Reinforcement of answers that get a reward (moe-gpt finetune)."""
    see: SeeConfig | None = None
    """Pictures for a finished text model, which stays as it is (moe-gpt finetune)."""
    adapters: AdaptersConfig | None = None
    """Low-rank adapters (LoRA) beside sft, reward, dpo or rl."""

    @property
    def stage(self) -> str | None:
        """The section of the stage after pre-training that this run is; None for pre-training."""
        return next((name for name in STAGES if getattr(self, name)), None)

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between sections."""
        given = [name for name in STAGES if getattr(self, name)]
        text = f"{', '.join(STAGES)}: a run is one stage, got the sections {' and '.join(given)}; give one"
        yield from unless(len(given) < 2, text, *given)
        limits = {"train.micro_batch_tokens": self.train.micro_batch_tokens}
        if not self.stage:  # a later stage takes the model's shape from --init-from
            limits["model.max_seq_len"] = self.model.max_seq_len
        stages = self.schedule.stages
        for (index, stage), (limit_key, limit) in itertools.product(enumerate(stages), limits.items()):
            key = f"schedule.stages.{index}.seq_len"
            text = f"{key} must be at most {limit_key}={limit}, got {stage.seq_len}"
            yield from unless(stage.seq_len <= limit, text, key, limit_key)
        key = f"schedule.stages.{len(stages) - 1}.until_tokens"
        text = f"{key} is required when sources have weights, because weights do not set the length of a run"
        yield from unless(
            bool(self.stage) or stages[-1].until_tokens is not None or not self.data.has_weights, text, key
        )
        text = "optimizer.name must be adamw with model.mup_base, whose scales are Adam's, got muon"
        yield from unless(
            not self.model.mup_base or self.optimizer.name == "adamw", text, "optimizer.name", "model.mup_base"
        )
        yield from self._row_problems()
        yield from self._answer_problems()
        yield from self._adapter_problems()
        yield from self._see_problems()

    def _row_problems(self) -> Iterator[Problem]:
        """Yield sequences that are no rows of conversations."""
        for index, stage in enumerate(self.schedule.stages if self.sft else ()):
            key, row_tokens = f"schedule.stages.{index}.seq_len", self.sft.row_tokens  # type: ignore[union-attr]
            text = f"{key} must be sft.row_tokens={row_tokens}, got {stage.seq_len}, because rows are served whole"
            yield from unless(stage.seq_len == row_tokens, text, key, "sft.row_tokens")

    def _answer_problems(self) -> Iterator[Problem]:
        """Yield sampled answers that leave no room for their prompts in a row."""
        key, longest = self._longest_answer()
        for index, stage in enumerate(self.schedule.stages):
            limit_key = f"schedule.stages.{index}.seq_len"
            text = f"{key} must be less than {limit_key}={stage.seq_len}, got {longest}: a prompt needs room too"
            yield from unless(longest < stage.seq_len, text, key, limit_key)

    def _longest_answer(self) -> tuple[str, int]:
        """Return the key and the tokens of the longest answer that the stage samples; 0 where it samples none."""
        if self.rl:
            return "rl.max_new_tokens", self.rl.max_new_tokens
        pairs = getattr(self.reward or self.dpo, "pairs", None)
        return f"{self.stage}.pairs.max_new_tokens", pairs.max_new_tokens if pairs and pairs.builtin else 0

    def _adapter_problems(self) -> Iterator[Problem]:
        """Yield adapters in pre-training, and beside another choice of what learns."""
        fits = self.adapters is None or bool(self.stage)
        text = f"adapters: they are for the stages of moe-gpt finetune; give a section {', '.join(STAGES)} too"
        yield from unless(fits, text, "adapters")
        fits = self.adapters is None or self.train.train_only is None
        text = "adapters and train.train_only exclude each other; use adapters.also_train beside adapters"
        yield from unless(fits, text, "adapters", "train.train_only")

    def _see_problems(self) -> Iterator[Problem]:
        """Yield settings that would change the text model of a stage that must not, or that it cannot have."""
        given = {
            "adapters": self.adapters,
            "train.train_only": self.train.train_only,
            "train.compile": self.train.compile,
        }
        for key, value in given.items():
            text = f"{key} and see exclude each other: the text model stays as it is; leave {key} out"
            yield from unless(not (self.see and value), text, key, "see")
        lengths = {stage.seq_len for stage in self.schedule.stages}
        text = f"schedule.stages must have one seq_len in the stage see, whose rows are all visited, got {lengths}"
        yield from unless(not self.see or len(lengths) == 1, text, "schedule.stages", "see")
