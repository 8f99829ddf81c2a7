"""A stage of a pipeline: a model with some of the blocks.

Hidden states arrive in the place of embeddings and leave before the last norm. The loss of an inner stage has the terms
of its own layers. Its cross entropy is 0, with the gradient that comes back from the next stage. Statistics have zeros
for the layers of other stages, so that they can be added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_gpt.model.losses import IGNORED_TARGET, CrossEntropy, RouterStats
from moe_gpt.model.transformer import MoEGPT


class _Nothing(nn.Identity):
    """Takes the place of what another stage holds."""

    weight = None


class Stage(MoEGPT):
    """Consecutive blocks of a whole model, with the embedding if they are the first and the output if the last.

    The last stage has a copy of a tied matrix, under the embedding's name.

    Args:
        whole: the model, whose modules this one shares.
        number: counts stages, from 0.
        layers: those of each stage.
    """

    def __init__(self, whole: Any, number: int, layers: Sequence[range]) -> None:
        nn.Module.__init__(self)
        self.config, self.make_router, self.number = whole.config, whole.make_router, number
        self.is_first, self.is_last, self.layers = number == 0, number == len(layers) - 1, layers[number]
        self.arrived: Any = None
        """The hidden states (B, T, D) of the stage before."""
        self.leaving: Any = None
        """The hidden states for the next stage; in a backward pass their gradient."""
        has_matrix = self.is_first or (self.is_last and self.config.tie_embeddings)
        self.embedding = whole.embedding if has_matrix else _nothing()
        self.blocks = nn.ModuleList()
        for layer in self.layers:
            self.blocks.add_module(str(layer), whole.blocks[layer])
        self.final_norm, self.output = (whole.final_norm, whole.output) if self.is_last else (_nothing(), _nothing())
        self._join_others(whole.score)

    def _join_others(self, score: Callable[..., CrossEntropy]) -> None:
        arrive: Any = lambda tokens: self.arrived  # noqa: E731
        if not self.is_first:
            self.embedding.forward = arrive  # type: ignore[method-assign]
        if not self.is_last:
            self.final_norm.forward = self._leave  # type: ignore[method-assign, assignment]
        self.score: Any = score if self.is_last else self._score_of_next

    def _leave(self, hidden: Tensor) -> Tensor:
        self.leaving = hidden.detach()
        return hidden

    def _score_of_next(self, hidden: Tensor, weight: None, targets: Tensor) -> CrossEntropy:
        return CrossEntropy(_CrossEntropyOfNext.apply(hidden, self), (targets != IGNORED_TARGET).sum())

    def _stats(self, *arguments: Any, **options: Any) -> RouterStats | None:
        """Return the statistics of all layers."""
        stats, layers = super()._stats(*arguments, **options), self.layers
        around = layers.start, self.config.n_layers - layers.stop
        return stats and RouterStats(*(F.pad(part, (0, 0) * (part.dim() - 1) + around) for part in stats))


def _nothing() -> Any:
    return _Nothing()


def leave(loss: Tensor, stage: Stage) -> Tensor:
    """Return the hidden states that leave a stage. Their gradient is that of the stage's loss and of all later ones."""
    return _Leaving.apply(loss, stage)


class _CrossEntropyOfNext(torch.autograd.Function):
    """0, this stage's part of the cross entropy; the gradient of the hidden states comes from the next stage."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, stage: Stage) -> Tensor:
        ctx.stage, ctx.shape = stage, hidden.shape
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.stage.leaving.view(ctx.shape), None


class _Leaving(torch.autograd.Function):
    """Hidden states that leave. Backward, their gradient waits for ``_CrossEntropyOfNext``, behind the stage's loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, stage: Stage) -> Tensor:
        ctx.stage = stage
        return stage.leaving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.stage.leaving = grad
        return grad.new_ones(()), None
