"""Losses on pairs of answers of which people (or a rule) chose one: for a reward model, and for a policy without one.

N is pairs, B answers, T tokens. Every loss is a mean over pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def sequence_log_probs(log_probs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Return ln p of whole answers: the sum over the tokens that the mask has."""
    return log_probs.masked_fill(~mask, 0.0).sum(1)


def bradley_terry_loss(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], center: float = 0.01
) -> Float[Tensor, ""]:
    """Return -ln sigmoid(chosen - rejected) of a reward model's scores (InstructGPT, arXiv 2203.02155, eq. 1).

    The loss of scores does not depend on a constant that is added to both. ``center`` is the weight of the squared sum
    of a pair's scores, which keeps them around 0 (arXiv 2312.09244). A pair of equal answers gives ln 2 and no gradient
    but that of ``center``; leave such pairs out.
    """
    return -F.logsigmoid(chosen - rejected).mean() + center * (chosen + rejected).square().mean()


def dpo_loss(
    chosen: Float[Tensor, "N"],
    rejected: Float[Tensor, "N"],
    reference_chosen: Float[Tensor, "N"],
    reference_rejected: Float[Tensor, "N"],
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """Return -ln sigmoid(beta · (margin - reference's margin)) (DPO, arXiv 2305.18290, eq. 7).

    Args:
        chosen: ``sequence_log_probs`` of the policy for the better answers.
        rejected: the same for the worse answers.
        reference_chosen: the same of the model before training.
        reference_rejected: the same.
        beta: how strongly the policy is held to the reference.
    """
    margins = implicit_rewards(chosen, reference_chosen, beta) - implicit_rewards(rejected, reference_rejected, beta)
    return -F.logsigmoid(margins).mean()


def implicit_rewards(
    log_probs: Float[Tensor, "N"], reference_log_probs: Float[Tensor, "N"], beta: float = 0.1
) -> Float[Tensor, "N"]:
    """Return beta · ln(p / p_reference), the reward under which the policy is the best one (DPO, eq. 5)."""
    return beta * (log_probs - reference_log_probs)
