"""The loss on pre-training's text beside that of reinforcement: PPO-ptx of InstructGPT (arXiv 2203.02155, equation 2).

It holds the policy to the text that it was trained on, which rewards alone let it forget.
"""

from __future__ import annotations

import dataclasses

import torch

from moe_gpt.config import RunConfig
from moe_gpt.data.batches import split_batch
from moe_gpt.data.prepare import PreparedData
from moe_gpt.data.stream import TrainingStream
from moe_gpt.errors import InputError
from moe_gpt.model.losses import LossTerms
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.setup import Run
from moe_gpt.training.stage import Material, build_stream
from moe_gpt.training.step import accumulate_gradients


@dataclasses.dataclass(frozen=True)
class PretrainingMix:
    """A weight and a stream: each step reads as many tokens of pre-training's text as its plan has."""

    weight: float
    stream: TrainingStream

    @classmethod
    def of(cls, weight: float, config: RunConfig, data: PreparedData) -> PretrainingMix | None:
        """Return a mix with the text of the run, None for a weight of 0.

        Raises:
            InputError: where the text of pre-training is not there.
        """
        if not weight:
            return None
        if not data.sources:
            raise InputError(
                f"rl.pretraining_weight={weight} needs the text of pre-training, which is not known or cannot be read; "
                "give its data.sources, or set the weight to 0"
            )
        return cls(weight, build_stream(config, data, Material(data).shares(config.data)))

    def add_gradients(self, run: Run, plan: StepPlan) -> LossTerms:
        """Add the gradients of the weighted loss to ``.grad``, which must hold none; return terms without weight."""
        batch = self.stream.batch(run.state.tokens_seen, plan.seq_len, plan.batch_tokens)
        parts = split_batch(batch, run.config.train.micro_batch_tokens, run.device, run.document_end_id)
        terms, _ = accumulate_gradients(run.state.model, parts, run.config.loss, run.precision)
        gradients = [p.grad for p in run.state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, self.weight)
        return terms
