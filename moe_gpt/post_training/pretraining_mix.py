"""The loss on pre-training's text beside that of reinforcement: PPO-ptx of InstructGPT (arXiv 2203.02155, equation 2).

It holds the policy to the text that it was trained on, which rewards alone let it forget.
"""

from __future__ import annotations

import dataclasses

from moe_gpt.config import RunConfig
from moe_gpt.config.post_training import RlConfig
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
    """A weight and a stream: each update reads as many tokens of pre-training's text as the step's plan has."""

    weight: float
    stream: TrainingStream
    updates: int = 1
    """Of a step."""

    @classmethod
    def of(cls, rl: RlConfig, config: RunConfig, data: PreparedData) -> PretrainingMix | None:
        """Return a mix with the text of the run, None for a weight of 0.

        Raises:
            InputError: where the text of pre-training is not there.
        """
        if not rl.pretraining_weight:
            return None
        if not data.sources:
            raise InputError(
                f"rl.pretraining_weight={rl.pretraining_weight} needs the text of pre-training, which is not known "
                "or cannot be read; give its data.sources, or set the weight to 0"
            )
        stream = build_stream(config, data, Material(data).shares(config.data))
        return cls(rl.pretraining_weight, stream, rl.updates)

    def add_gradients(self, run: Run, plan: StepPlan, number: int = 0) -> LossTerms:
        """Add the gradients of the weighted loss to ``.grad``; return terms without weight.

        Args:
            number: of the update in its step, from 0; each update reads text of its own.
        """
        first = run.state.tokens_seen * self.updates + number * plan.batch_tokens
        batch = self.stream.batch(first, plan.seq_len, plan.batch_tokens)
        parts = split_batch(batch, run.config.train.micro_batch_tokens, run.device, run.document_end_id)
        config, precision = run.config.loss, run.precision
        return accumulate_gradients(run.state.model, parts, config, precision, weight=self.weight)[0]
