"""A decoder whose output is one number at each position, not logits: a reward model, or a value model for PPO.

Of a reward model only the number at an answer's last token is used (InstructGPT, arXiv 2203.02155, section 3.5). A
value model estimates the coming reward at every position and starts as a copy of the reward model. A checkpoint of
either is an ordinary checkpoint, with the head in the place of the output matrix.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.config import ModelConfig
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.model.moe import MoE
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.transformer import ModelOutput, MoEGPT
from moe_gpt.training.saving.checkpoint import copy_weights
from moe_gpt.training.saving.manifest import WEIGHTS
from moe_gpt.training.saving.own_code import router_for
from moe_gpt.training.saving.saved_model import open_checkpoint
from moe_gpt.training.saving.shards import open_tensors


class ScalarHead(nn.Module):
    """(x · weight - mean) / std, where mean and std are buffers that ``normalise`` sets."""

    mean: Tensor
    std: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, d_model))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw the weight with the standard deviation 1/sqrt(d_model + 1) (arXiv 2009.01325), and forget the scale."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1] + 1))
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch 1"]:
        """Return one number for each hidden state, in float32."""
        return (ops.linear(x, self.weight).float() - self.mean) / self.std


class RewardModel(MoEGPT):
    """A ``MoEGPT`` with a ``ScalarHead`` as its output. A config with tied embeddings becomes one without."""

    output: ScalarHead  # type: ignore[assignment]

    def __init__(self, config: ModelConfig, make_router: MakeRouter = Router) -> None:
        super().__init__(dataclasses.replace(config, tie_embeddings=False), make_router)
        self.output = ScalarHead(config.d_model)
        self.output.init_weights(0.0, 0.0)

    @classmethod
    def from_model(cls, model: MoEGPT) -> RewardModel:
        """Return a reward model with copies of a model's weights and a new head, drawn from torch's generator.

        From a reward model the head is copied too.
        """
        result = cls(model.config, model.make_router)
        saved = model.state_dict()
        if not isinstance(model, RewardModel):
            saved = {name: x for name, x in saved.items() if not name.startswith("output.")}
            saved |= result.output.state_dict(prefix="output.")
        result.load_state_dict(saved)
        return result.to(model.embedding.weight.device)

    def values(self, tokens: Int[Tensor, "B T"], valid_mask: Bool[Tensor, "B T"]) -> tuple[Tensor, ModelOutput]:
        """Return the number at every position (B, T), and the forward pass's output for the routers' losses."""
        output = self(tokens, valid_mask)
        return output.logits[..., 0], output

    def scores(self, tokens: Int[Tensor, "B T"], valid_mask: Bool[Tensor, "B T"]) -> tuple[Tensor, ModelOutput]:
        """Return the number at each row's last valid token (B,), wherever padding is, and the pass's output."""
        values, output = self.values(tokens, valid_mask)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(valid_mask, places, 0).amax(1, keepdim=True)
        return values.gather(1, last)[:, 0], output

    @torch.no_grad()
    def normalise(self, scores: Float[Tensor, "N"]) -> None:
        """Rescale later scores such that these, of the reference's samples, would have mean 0 and deviation 1.

        Without it one KL weight means something else for each reward model (arXiv 1909.08593).

        Raises:
            InputError: where the scores are fewer than two, equal or not finite.
        """
        std = scores.std() if len(scores) > 1 else torch.zeros(())
        if not (std.isfinite() and std > 0):
            raise InputError(
                f"the reward model's scores of the reference's samples must differ and be finite, got {len(scores)} "
                f"with standard deviation {std.item():.3g}; take more samples, or train the reward model longer"
            )
        self.output.mean += self.output.std * scores.mean()
        self.output.std *= std


class ActorCritic(MoEGPT):
    """A policy with a value model beside it, so that PPO's optimizer and checkpoints have the parameters of both."""

    def __init__(self, config: ModelConfig, make_router: MakeRouter = Router) -> None:
        super().__init__(config, make_router)
        self.value = RewardModel(config, make_router)

    @classmethod
    def of(cls, policy: MoEGPT, value: RewardModel) -> ActorCritic:
        """Return copies of a policy and a value model (a reward model, at the start) as one."""
        result = cls(policy.config, policy.make_router)
        values = {f"value.{name}": tensor for name, tensor in value.state_dict().items()}
        result.load_state_dict({**policy.state_dict(), **values})
        return result.to(policy.embedding.weight.device)

    def moe_layers(self) -> list[MoE]:
        """Return the policy's layers; those of the value model are its own."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoE)]


def load_reward_model(
    run_or_checkpoint: str | Path, make_router: MakeRouter | None = None, tokenizer: Tokenizer | None = None
) -> RewardModel:
    """Return the reward (or value) model of a run or checkpoint, in evaluation mode.

    Args:
        run_or_checkpoint: of a run with a section reward.
        make_router: the router that it was trained with, if it is a user's.
        tokenizer: that of the policy, which it must have too.

    Raises:
        FileNotFoundError: if there is no complete checkpoint.
        InputError: if it is damaged, of a model with an ordinary output, of another router, or of another tokenizer.
    """
    saved = open_checkpoint(run_or_checkpoint)
    model = RewardModel(saved.config.model, router_for(saved.router, make_router, str(saved.path)))
    reader = open_tensors(saved.path, WEIGHTS)
    if "output.std" not in reader.names:
        raise InputError(f"checkpoint {saved.path} must be of a reward model, got an ordinary one; train one first")
    if tokenizer and saved.tokenizer.to_json() != tokenizer.to_json():
        raise InputError(
            f"checkpoint {saved.path} must have the policy's tokenizer, got another one; train the reward model with "
            "the --init-from of the policy"
        )
    copy_weights(model, {name: reader.read(name) for name in reader.names}, f"checkpoint {saved.path}")
    return model.eval()
