"""Reinforcement learning on answers: advantages, importance ratios, losses and the distance to a reference.

The functions are pure. B is answers, T tokens, P prompts, S answers of one prompt. Log-probabilities and masks have
a place for each token of the answers. The mask is False at padding, whose numbers are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_gpt.errors import InputError, shown

Importance = Literal["token", "sequence", "trajectory"]
Reduction = Literal["grpo", "dr_grpo", "bnpo", "dapo"]
KLEstimator = Literal["k1", "k3"]
Numbers = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
Rewards = Tensor | Sequence[Sequence[float | None]]
"""(P, S): numbers or booleans; None is a missing one, which is refused."""


def token_log_probs(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], temperature: float = 1.0) -> Numbers:
    """Return ln p(target) in nats, in float32, of the distribution that was sampled: logits over the temperature."""
    scaled = logits.float().flatten(0, 1) / temperature
    return -F.cross_entropy(scaled, targets.flatten(), reduction="none").view_as(targets)


def entropy(logits: Float[Tensor, "B T V"], temperature: float = 1.0) -> Numbers:
    """Return the entropy of each position's distribution in nats, in float32."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def checked_rewards(rewards: Rewards, name: str = "reward") -> Float[Tensor, "P S"]:
    """Return rewards in float32, one row for each prompt.

    Raises:
        InputError: where a reward is missing or not finite, naming the prompt's row (from 1) and the reward; where
            prompts have fewer than two answers or different numbers of them.
    """
    rows = rewards.tolist() if isinstance(rewards, Tensor) else [list(row) for row in rewards]
    sizes = {len(row) for row in rows}
    if len(sizes) != 1 or min(sizes) < 2:
        raise InputError(
            "each prompt must have the same number of answers, at least 2, because an answer is compared with the "
            f"others of its prompt; got {shown(sorted(sizes))}; raise the number of samples"
        )
    values = torch.tensor([[torch.nan if value is None else float(value) for value in row] for row in rows])
    for row, answer in (~values.isfinite()).nonzero().tolist():
        raise InputError(
            f"{name} of prompt row {row + 1}, answer {answer + 1} must be a finite number, got {rows[row][answer]}; "
            "correct the reward function"
        )
    return values


def group_advantages(rewards: Rewards, scale: bool = False, name: str = "reward") -> Float[Tensor, "P S"]:
    """Return reward minus the mean reward of the prompt's answers.

    GRPO (arXiv 2402.03300, section 4.1.2) also divides by the standard deviation (``scale``), which gives prompts that
    are almost always or almost never answered a larger weight; Dr. GRPO (arXiv 2503.20783, section 3.1) does not. The
    deviation is the sample's, plus 1e-4. A prompt whose answers have equal rewards gets exactly 0.

    Raises:
        InputError: as ``checked_rewards``.
    """
    centred = _centred(checked_rewards(rewards, name))
    if scale:
        centred = centred / (centred.std(dim=1, keepdim=True) + 1e-4)
    return centred.float()


def leave_one_out_advantages(rewards: Rewards, name: str = "reward") -> Float[Tensor, "P S"]:
    """Return reward minus the mean reward of the prompt's other answers (RLOO, arXiv 2402.14740).

    A prompt whose answers have equal rewards gets exactly 0.

    Raises:
        InputError: as ``checked_rewards``.
    """
    centred = _centred(checked_rewards(rewards, name))
    return (centred * centred.shape[1] / (centred.shape[1] - 1)).float()


def _centred(rewards: Float[Tensor, "P S"]) -> Float[Tensor, "P S"]:
    """Return rewards minus their row's mean in float64; the mean of differences is exact where all are 0."""
    differences = rewards.double() - rewards[:, :1].double()
    return differences - differences.mean(dim=1, keepdim=True)


def token_rewards(scores: Float[Tensor, "B"], kl: Numbers, mask: Mask, kl_weight: float) -> Numbers:
    """Return -kl_weight · kl at each token, and the score added at the last one (InstructGPT, arXiv 2203.02155, eq. 2).

    Args:
        scores: of whole answers.
        kl: ``kl_estimate`` k1, without gradient.
        mask: which tokens the policy chose; each row has one.
        kl_weight: in units of reward per nat.
    """
    n_later = mask.flip(1).cumsum(1).flip(1)  # counts the token itself
    is_last = mask & (n_later == 1)
    return torch.where(mask, -kl_weight * kl, 0.0) + is_last * scores[:, None]


def gae(
    rewards: Numbers, values: Numbers, mask: Mask, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Numbers, Numbers]:
    """Return advantages and returns of each token, 0 where the mask is False (arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma · V_t' - V_t, and A_t = delta_t + gamma · lam · A_t', where t' is the answer's next token that
    the mask has. V and A after the last are 0. The return, which the value model learns, is A_t + V_t.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_advantage = torch.where(mask[:, t], advantages[:, t], next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Numbers, mask: Mask) -> Numbers:
    """Return x with mean 0 and variance 1 over the mask, 0 elsewhere. Equal numbers become 0."""
    chosen = x[mask]
    whitened = (x - chosen.mean()) * (chosen.var(correction=0) + 1e-8).rsqrt()
    return torch.where(mask, whitened, 0.0)


def importance_ratios(
    log_probs: Numbers, old_log_probs: Numbers, mask: Mask, importance: Importance = "token"
) -> Float[Tensor, "B #T"]:
    """Return how much likelier the policy makes what its older self sampled, 1 where nothing has changed.

    ``token`` is each token's ratio (PPO, arXiv 1707.06347, eq. 6). ``sequence`` is the geometric mean over the answer
    (GSPO, arXiv 2507.18071, eq. 7). ``trajectory`` is the product over the answer, as in RLOO (arXiv 2402.14740).
    """
    log_ratios = torch.where(mask, log_probs - old_log_probs, 0.0)
    if importance == "token":
        return log_ratios.exp()
    total = log_ratios.sum(1, keepdim=True)
    return (total if importance == "trajectory" else total / mask.sum(1, keepdim=True).clamp(min=1)).exp()


def clipped_loss(
    ratios: Float[Tensor, "B #T"], advantages: Float[Tensor, "B #T"], clip: float = 0.2
) -> Float[Tensor, "B #T"]:
    """Return -min(ratio · A, clip(ratio, 1 - clip, 1 + clip) · A) (PPO, arXiv 1707.06347, eq. 7)."""
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def kl_estimate(log_probs: Numbers, reference_log_probs: Numbers, mask: Mask, kind: KLEstimator = "k3") -> Numbers:
    """Return an estimate of KL(policy || reference) at each token that the policy sampled, 0 outside of the mask.

    With d = ln p_reference - ln p, k1 is -d, and k3 is exp(d) - d - 1, which is never negative (Schulman, 2020). Both
    have the KL as their mean. Neither is a loss: the mean gradient of k1 is 0, and that of k3 is the gradient of the
    KL in the other direction. Put k1 into the reward, or multiply by ``importance_ratios`` (``policy_loss``).
    """
    d = torch.where(mask, reference_log_probs - log_probs, 0.0)
    return -d if kind == "k1" else d.exp() - d - 1


def token_weights(mask: Mask, reduction: Reduction = "dr_grpo", max_new_tokens: int | None = None) -> Numbers:
    """Return the weight of each token in a loss.

    grpo: the mean over each answer's tokens, then over answers (arXiv 2402.03300, eq. 3); a token of a long answer
    counts less. dr_grpo: the sum over B · max_new_tokens (arXiv 2503.20783), so that a token counts the same in short
    and long answers. bnpo and dapo (arXiv 2503.14476, eq. 8): the sum over the tokens of all answers. They differ where
    a batch is cut into micro-batches: bnpo takes the micro-batch's mask, and dapo rows of the whole batch's weights.

    Args:
        mask: of the whole batch, so that the losses of micro-batches can be added; of a micro-batch for bnpo.
        reduction: see above.
        max_new_tokens: the longest answer that the sampler allows; the mask's width by default.
    """
    B, T = mask.shape
    if reduction == "grpo":
        divisor = mask.sum(1, keepdim=True).clamp(min=1) * B
    elif reduction == "dr_grpo":
        divisor = torch.tensor(B * (max_new_tokens or T), device=mask.device)
    else:
        divisor = mask.sum().clamp(min=1)
    return mask / divisor


def policy_loss(
    log_probs: Numbers,
    old_log_probs: Numbers,
    advantages: Float[Tensor, "B #T"],
    mask: Mask,
    weights: Numbers,
    *,
    clip: float = 0.2,
    importance: Importance = "token",
    reference_log_probs: Numbers | None = None,
    kl_weight: float = 0.0,
    kl: KLEstimator = "k3",
) -> Float[Tensor, ""]:
    """Return the sum of the tokens' clipped losses and weighted KL, with ``weights`` from ``token_weights``.

    The KL is multiplied by the importance ratio, which makes its gradient that of the KL at the sampled beginnings
    (DeepSeek-V3.2, arXiv 2512.02556). What a token does to the KL of later ones is left out; the KL in the
    reward (``token_rewards``) has both.

    Args:
        log_probs: of the policy, with gradient.
        old_log_probs: of the policy that sampled; ``log_probs.detach()`` where it has not moved since.
        advantages: one for each answer (B, 1), or each token.
        mask: which tokens the policy chose.
        weights: of the tokens in the sum.
        clip: largest distance of a ratio from 1 that still changes the loss.
        importance: ``importance_ratios``.
        reference_log_probs: of the model to stay close to; None leaves the KL out.
        kl_weight: factor of the KL.
        kl: ``kl_estimate``.
    """
    ratios = importance_ratios(log_probs, old_log_probs, mask, importance)
    loss = clipped_loss(ratios, torch.where(mask, advantages, 0.0), clip)
    if reference_log_probs is not None:
        loss = loss + kl_weight * ratios * kl_estimate(log_probs, reference_log_probs, mask, kl)
    return (loss * weights).sum()


def value_loss(
    values: Numbers, old_values: Numbers, returns: Numbers, mask: Mask, weights: Numbers, clip: float = 0.2
) -> Float[Tensor, ""]:
    """Return half the weighted squared errors of the values or of their clipped forms, whichever are larger.

    A value moves at most ``clip`` from its old value, as in the code of PPO's authors.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (torch.where(mask, errors, 0.0) * weights).sum()
