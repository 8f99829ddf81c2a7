"""What speculative decoding gains (Leviathan et al., arXiv 2211.17192).

A small model drafts gamma tokens and the model verifies them in one step. The paper takes that step to last as long as
decoding one token; ``speculative_speedup_on`` counts what it costs.
"""

from __future__ import annotations

import math

from moe_gpt.config import ModelConfig
from moe_gpt.config.section import NonNegative, Rate, require
from moe_gpt.plan.options import DraftedTokens, PlanOptions
from moe_gpt.plan.quantities import PlanSection, plan_section
from moe_gpt.plan.serving import decoding_step


def expected_tokens_per_step(acceptance: float, gamma: int) -> float:
    """Return (1 - α^(γ+1)) / (1 - α): tokens that a verification of γ drafted ones yields (arXiv 2211.17192, eq. 1).

    Between 1 (nothing drafted or nothing accepted) and γ + 1 (everything accepted), where each drafted token is
    accepted with probability α, independently of the others.
    """
    require(Rate, acceptance=acceptance)
    require(DraftedTokens, gamma=gamma)
    return math.fsum(acceptance**i for i in range(gamma + 1))


def speculative_speedup(acceptance: float, draft_cost: float, gamma: int) -> float:
    """Return (1 - α^(γ+1)) / ((1 - α)(γ c + 1)): improvement in walltime (arXiv 2211.17192, theorem 3.8).

    Args:
        acceptance: α.
        draft_cost: c, a step of the draft model over a step of the model.
        gamma: γ, tokens drafted at a time. Verifying them is taken to last as long as decoding one token.
    """
    require(NonNegative, draft_cost=draft_cost)
    return expected_tokens_per_step(acceptance, gamma) / (gamma * draft_cost + 1)


def best_gamma(acceptance: float, draft_cost: float, max_gamma: int = 64) -> int:
    """Return the γ up to ``max_gamma`` with the highest ``speculative_speedup``, the least of equals.

    0 where acceptance <= draft_cost: drafting then never pays (arXiv 2211.17192, corollary 3.9). With acceptance 1,
    or a draft that is free, more is always better and the answer is ``max_gamma``.
    """
    return max(range(max_gamma + 1), key=lambda gamma: (speculative_speedup(acceptance, draft_cost, gamma), -gamma))


def speculative_speedup_on(config: ModelConfig, options: PlanOptions, n_sequences: int, context: int) -> float:
    """Return the improvement in walltime where verifying costs what it costs.

    The γ + 1 tokens of a verification touch more experts than one token does, and multiply γ + 1 times as much; the
    paper's formula counts neither. Below 1 where the batch is compute-bound already.

    Args:
        config: the shape.
        options: the GPU, the cluster that serves, and acceptance, draft cost and gamma.
        n_sequences: decoded together.
        context: positions that each new token sees.
    """
    gpu, tensor, gamma = options.gpu, options.serving.tensor, options.gamma
    plain = decoding_step(config, n_sequences, context, tensor).seconds(gpu, tensor)
    verifying = decoding_step(config, n_sequences, context, tensor, tokens_each=gamma + 1).seconds(gpu, tensor)
    tokens = expected_tokens_per_step(options.acceptance, gamma)
    return tokens * plain / (verifying + gamma * options.draft_cost * plain)


def speculation_section(config: ModelConfig, options: PlanOptions, context: int) -> PlanSection:
    """Return the section ``speculative_decoding``: the paper's gain, the best gamma, and the gain on this hardware."""
    acceptance, draft_cost, gamma, batch = options.acceptance, options.draft_cost, options.gamma, options.batch
    best = best_gamma(acceptance, draft_cost)
    values = {
        "acceptance": acceptance,
        "draft_cost": draft_cost,
        "gamma": gamma,
        "tokens_per_step": expected_tokens_per_step(acceptance, gamma),
        "speedup": speculative_speedup(acceptance, draft_cost, gamma),
        "best_gamma": best,
        "best_speedup": speculative_speedup(acceptance, draft_cost, best),
        "speedup_at_1": speculative_speedup_on(config, options, 1, context),
        "speedup_at_64": speculative_speedup_on(config, options, 64, context),
        "speedup_at_batch": speculative_speedup_on(config, options, batch, context),
    }
    return plan_section("speculative_decoding", values, options=options)
