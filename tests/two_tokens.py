"""A policy over two tokens and answers of two, so that every answer can be enumerated and every mean is exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ANSWERS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
MASK = torch.ones(1, 2, dtype=torch.bool)


def random_table(seed: int) -> Tensor:
    """Return logits (3, 2): of the first token, and of the second after each first token; float64, with gradient."""
    table = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return table.requires_grad_()


def log_probs_of(table: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens of all answers, (4, 2)."""
    logs = table.log_softmax(-1)
    return torch.stack([logs[0, ANSWERS[:, 0]], logs[1 + ANSWERS[:, 0], ANSWERS[:, 1]]], dim=1)


def mean_gradient(table: Tensor, loss_of: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the mean over sampled answers of the gradient of their losses.

    Args:
        table: the policy.
        loss_of: takes the number of an answer and its log-probabilities (1, 2).
    """
    log_probs = log_probs_of(table)
    probs = log_probs.detach().sum(1).exp()
    loss = sum(probs[i] * loss_of(i, log_probs[i : i + 1]) for i in range(4))
    return torch.autograd.grad(loss, table)[0]
