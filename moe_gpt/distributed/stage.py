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

from moe_gpt.distributed.linked import linked
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
        self.embedding: Any = whole.embedding if has_matrix else _Nothing()
        self.blocks = nn.ModuleList()
        for layer in self.layers:
            self.blocks.add_module(str(layer), whole.blocks[layer])
        self.final_norm: Any = whole.final_norm if self.is_last else _Nothing()
        self.output: Any = whole.output if self.is_last else _Nothing()
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
        """Return 0, this stage's part of the cross entropy; the hidden states' gradient comes from the next stage."""
        shape = hidden.shape
        zero = linked(hidden, lambda x: x.new_zeros((), dtype=torch.float32), lambda _: self.leaving.view(shape))
        return CrossEntropy(zero, (targets != IGNORED_TARGET).sum())

    def _stats(self, *arguments: Any, **options: Any) -> RouterStats | None:
        """Return the statistics of all layers."""
        stats, layers = super()._stats(*arguments, **options), self.layers
        around = layers.start, self.config.n_layers - layers.stop
        return stats and RouterStats(*(F.pad(part, (0, 0) * (part.dim() - 1) + around) for part in stats))


def leave(loss: Tensor, stage: Stage) -> Tensor:
    """Return the hidden states that leave a stage. Their gradient is that of the stage's loss and of all later ones.

    It waits in the stage for the cross entropy of the next stages, which is behind the stage's own loss.
    """

    def keep(grad: Tensor) -> Tensor:
        stage.leaving = grad
        return grad.new_ones(())

    return linked(loss, lambda _: stage.leaving, keep)
