"""What a plan supposes besides the config; every number is checked here, once."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

from moe_gpt.config import ModelConfig
from moe_gpt.config.section import AtMostOne, Count, Flag, NonNegative, Positive, Rate, Section
from moe_gpt.plan.hardware import Gpu, Parallelism

Utilisation = Annotated[AtMostOne | None, Field(title="a number above 0 and at most 1 (34 % is 0.34)")]
DraftedTokens = Annotated[int, Field(ge=0, le=1000, title="a whole number from 0 to 1000")]


@dataclasses.dataclass(frozen=True)
class Failures(Section):
    """How often a run breaks, and what it then takes. The times are our assumptions; give your own.

    The default time between failures rounds that of Llama 3's 54 days (arXiv 2407.21783, table 5: 419 unexpected
    interruptions on 16,384 GPUs, one in 50,700 GPU hours).
    """

    gpu_hours_between: Positive = 50_000.0
    """Mean GPU hours between two failures."""
    restart_seconds: Positive = 900.0
    """From a failure to the next useful step, besides the work that is lost."""
    checkpoint_seconds: Positive = 60.0
    """How long a checkpoint stops training."""
    interval_seconds: Positive | None = None
    """Between the ends of two checkpoints (default: the interval that loses least)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Section):
    """The cluster, its price, what else is asked, and how the model is served."""

    gpu: Gpu
    """Each GPU of both clusters."""
    layout: Parallelism = Parallelism(1)
    """The cluster that trains the model."""
    serving: Parallelism = Parallelism(1)
    """The cluster that serves the model: ``n_gpus``, ``tensor`` and ``pipeline`` of it are used. As many copies of the
    model work as fit; the rest is spare but paid for."""
    mfu: Utilisation = None
    """Model FLOPs utilisation: the share of all GPUs' peak that 6 N D per second comes to (default: 0.4, a guess; on
    the CPU 0.14 to 0.67, what moe_gpt was measured at with models as wide as this one)."""
    price: Positive = 1.0
    """Dollars per GPU-hour."""
    context: Count | None = None
    """Positions that a token sees, for FLOPs per token and for serving (default: the last stage's sequence length)."""
    tokens: Positive | None = None
    """Training tokens (default: the schedule's)."""
    recompute: Flag | None = None
    """Compute activations again in the backward pass (default: train.activation_checkpointing of the config)."""
    micro_batch_sequences: Count = 1
    """Sequences of one forward pass in training."""
    failures: Failures = Failures()
    """How often the run breaks."""
    duration_seconds: Positive | None = None
    """Also say the MFU of a run that took so long."""
    budget: Positive | None = None
    """Also say the tokens that so many dollars pay for."""
    batch: Count = 64
    """Sequences that pass through a stage together when serving; every stage has such a batch in flight."""
    acceptance: Rate = 0.8
    """Probability that a drafted token is accepted."""
    draft_cost: NonNegative = 0.05
    """A step of the draft model over a step of the model."""
    gamma: DraftedTokens = 4
    """Tokens drafted at a time."""

    @property
    def is_one_cpu(self) -> bool:
        """Whether the plan is for this machine's processor, so that there are no nodes, and nobody is paid."""
        return self.gpu.is_cpu and self.layout.n_gpus == 1

    def utilisation(self, model: ModelConfig) -> float:
        """Return the MFU that was given, or else the one to assume."""
        if self.mfu is not None:
            return self.mfu
        if not self.gpu.is_cpu:
            return _MFU_OF_GPU
        import numpy as np

        return float(np.interp(model.d_model, *_MFU_OF_CPU))


_MFU_OF_GPU = 0.4
_MFU_OF_CPU = (64, 256, 512), (0.14, 0.53, 0.67)
"""d_model and MFU of moe_gpt in float32: tiny.yaml (README), shapes S and M (docs/benchmarks.md, training speed)."""
