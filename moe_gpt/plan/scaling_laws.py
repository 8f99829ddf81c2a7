"""Published scaling laws: the loss they predict, the sizes they call optimal, and the forecast that 2020 made of them.

Four laws that the reports on GPT-4 lean on, each with the constants that its paper prints: Kaplan et al. 2020 (arXiv
2001.08361), the GPT-3 paper's curve (arXiv 2005.14165, fig. 3.1), Hoffmann et al. 2022, called Chinchilla (arXiv
2203.15556), and Krajewski et al. 2024 for fine-grained mixtures of experts (arXiv 2402.07871). A loss is in nats per
token of that paper's own text and tokenizer, so losses of different laws do not compare.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from moe_gpt.config import ModelConfig
from moe_gpt.config.section import Positive, Section, require
from moe_gpt.errors import InputError
from moe_gpt.plan.parameters import counts_of
from moe_gpt.plan.quantities import PlanSection, plan_section
from moe_gpt.terminal.numbers import format_value

FLOPS_PER_PF_DAY = 8.64e19
"""1e15 FLOP/s for a day (arXiv 2001.08361, section 1.3)."""
TOKENS_PER_PARAMETER = 20.0
"""The rule of thumb from Chinchilla's first approach (arXiv 2203.15556, table 3: 8 B tokens for 400 M and so on)."""


class PowerLaw(NamedTuple):
    """loss = (scale / x)^exponent, where x is the one thing that is scarce."""

    scale: float
    exponent: float

    def loss(self, x: float) -> float:
        """Return the loss in nats per token at x, in the unit of ``scale``."""
        require(Positive, x=x)
        return (self.scale / x) ** self.exponent

    def needed_for(self, loss: float) -> float:
        """Return the x at which the law gives this loss: the inverse of ``loss``."""
        require(Positive, loss=loss)
        return self.scale / loss ** (1 / self.exponent)


KAPLAN_PARAMETERS = PowerLaw(8.8e13, 0.076)
"""L(N), non-embedding parameters, data and compute plentiful (arXiv 2001.08361, eq. 1.1)."""
KAPLAN_TOKENS = PowerLaw(5.4e13, 0.095)
"""L(D), tokens of the training text, stopped early (eq. 1.2)."""
GPT3_COEFFICIENT, GPT3_EXPONENT = 2.57, 0.048
GPT3_COMPUTE = PowerLaw(GPT3_COEFFICIENT ** (1 / GPT3_EXPONENT), GPT3_EXPONENT)
"""L(C) = 2.57 · C^-0.048, PF-days (arXiv 2005.14165, fig. 3.1)."""


def kaplan_loss(n_parameters: float, n_tokens: float) -> float:
    """Return L(N, D) = ((N_c / N)^(α_N / α_D) + D_c / D)^α_D in nats per token (arXiv 2001.08361, eq. 1.5).

    The constants are those of the joint fit, table 2: α_N 0.076, α_D 0.103, N_c 6.4e13, D_c 1.8e13. They differ from
    those of the separate laws, so that the limits of this one lie near, not on, L(N) and L(D).

    Args:
        n_parameters: without embeddings.
        n_tokens: of distinct text; the fit is about overfitting a text of that size.
    """
    require(Positive, n_parameters=n_parameters, n_tokens=n_tokens)
    return ((6.4e13 / n_parameters) ** (0.076 / 0.103) + 1.8e13 / n_tokens) ** 0.103


def kaplan_optimal(flops_budget: float) -> tuple[float, float]:
    """Return (N, D) = (1.3e9 · C^0.73, 2e10 · C^0.27), C in PF-days (arXiv 2001.08361, table 6, after eq. 1.7).

    Non-embedding parameters and tokens. The budget is C_min, what the run would take at batches far below the critical
    size; more tokens, and less growth of the model, is what Chinchilla found later.
    """
    require(Positive, flops_budget=flops_budget)
    pf_days = flops_budget / FLOPS_PER_PF_DAY
    return 1.3e9 * pf_days**0.73, 2e10 * pf_days**0.27


class ParametricLaw(NamedTuple):
    """L(N, D) = E + A / N^α + B / D^β: Chinchilla's approach 3 (arXiv 2203.15556, eq. 2)."""

    irreducible: float
    parameter_factor: float
    token_factor: float
    parameter_exponent: float
    token_exponent: float

    def loss(self, n_parameters: float, n_tokens: float) -> float:
        """Return the loss in nats per token; it falls in both arguments, towards ``irreducible``."""
        require(Positive, n_parameters=n_parameters, n_tokens=n_tokens)
        of_size = self.parameter_factor / n_parameters**self.parameter_exponent
        return self.irreducible + of_size + self.token_factor / n_tokens**self.token_exponent

    def optimal(self, flops_budget: float) -> tuple[float, float]:
        """Return the (N, D) with the lowest loss where 6 N D is the budget (arXiv 2203.15556, eq. 4).

        N = G · (C/6)^(β/(α+β)) and D = (C/6)^(α/(α+β)) / G with G = (α A / (β B))^(1/(α+β)).
        """
        require(Positive, flops_budget=flops_budget)
        total = self.parameter_exponent + self.token_exponent
        ratio = self.parameter_exponent * self.parameter_factor / (self.token_exponent * self.token_factor)
        product = flops_budget / 6
        n_parameters = ratio ** (1 / total) * product ** (self.token_exponent / total)
        return n_parameters, product / n_parameters


CHINCHILLA = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28)
"""As printed in the paper (arXiv 2203.15556, eq. 10), rounded; all parameters count, embeddings too."""
CHINCHILLA_UNROUNDED = ParametricLaw(1.6934, 406.4, 410.7, 0.3392, 0.2849)
"""The digits in the TeX source of that paper, which give its figures (arXiv 2404.10102 found and quotes them)."""
CHINCHILLA_REFIT = ParametricLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""Fitted again to the points of the paper's figure, to convergence (arXiv 2404.10102); agrees with 20 tokens each."""
KRAJEWSKI_DENSE = ParametricLaw(0.47, 16.3, 26.7, 0.126, 0.127)
"""The dense models beside the fine-grained ones (arXiv 2402.07871, table 1); non-embedding parameters."""


def krajewski_loss(n_parameters: float, n_tokens: float, granularity: float) -> float:
    """Return L = c + (g / G^γ + a) / N^α + b / D^β in nats per token (arXiv 2402.07871, eq. 9, table 1).

    Args:
        n_parameters: total ones, of all experts, without embeddings; the fit had 64 times a dense layer's.
        n_tokens: of C4.
        granularity: experts that share the width of the dense layer, and that a token goes to; 1 is a standard MoE.
    """
    require(Positive, granularity=granularity)
    return ParametricLaw(0.47, 2.1 / granularity**0.58 + 18.1, 30.8, 0.115, 0.147).loss(n_parameters, n_tokens)


def optimal_by_rule(flops_budget: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> tuple[float, float]:
    """Return (N, D) with D = tokens_per_parameter · N and 6 N D the budget: N = sqrt(C / (6 · 20))."""
    require(Positive, flops_budget=flops_budget, tokens_per_parameter=tokens_per_parameter)
    n_parameters = math.sqrt(flops_budget / (6 * tokens_per_parameter))
    return n_parameters, tokens_per_parameter * n_parameters


def predict_section(config: ModelConfig, tokens: float) -> PlanSection:
    """Return the loss that each law predicts for a shape and a number of training tokens.

    The fine-grained law takes ``top_k`` for the granularity: the experts of a token together stand for the layer that
    they replace. Tokens are those seen in training, repeated ones counted again.
    """
    require(Positive, tokens=tokens)
    counts = counts_of(config)
    total, active = counts.total - counts.embedding, counts.active - counts.embedding
    values = {
        "tokens": tokens,
        "kaplan_active": kaplan_loss(active, tokens),
        "kaplan_total": kaplan_loss(total, tokens),
        "gpt3_compute": GPT3_COMPUTE.loss(6 * counts.active * tokens / FLOPS_PER_PF_DAY),
        "chinchilla_active": CHINCHILLA.loss(counts.active, tokens),
        "chinchilla_total": CHINCHILLA.loss(counts.total, tokens),
        "refit_active": CHINCHILLA_REFIT.loss(counts.active, tokens),
        "refit_total": CHINCHILLA_REFIT.loss(counts.total, tokens),
        "fine_grained_dense": KRAJEWSKI_DENSE.loss(active, tokens),
    }
    is_mixture = not config.is_dense
    if is_mixture:
        values["fine_grained"] = krajewski_loss(total, tokens, config.top_k)
    applies = {"dense_laws": is_mixture, "fine_grained": is_mixture}
    return plan_section("predicted_loss", values, applies, model=config, granularity=config.top_k)


def optimal_section(flops_budget: float) -> PlanSection:
    """Return the parameters and tokens that spend a training budget best, by each law for dense models."""
    laws = {"chinchilla": CHINCHILLA, "unrounded": CHINCHILLA_UNROUNDED, "refit": CHINCHILLA_REFIT}
    optima = {
        "rule_of_20": optimal_by_rule(flops_budget),
        **{name: law.optimal(flops_budget) for name, law in laws.items()},
        "kaplan": kaplan_optimal(flops_budget),
    }
    values = {"flops_budget": flops_budget}
    for name, (n_parameters, n_tokens) in optima.items():
        values[f"{name}_parameters"] = n_parameters
        values[f"{name}_tokens"] = n_tokens
        if name in laws:
            values[f"{name}_loss"] = laws[name].loss(n_parameters, n_tokens)
    return plan_section("optimal_size", values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForecastInputs(Section):
    """What the forecast of 2020 starts from; quantities.yaml says what each is, and where it is from."""

    gpt2_parameters: Positive = 1.5e9
    gpt3_parameters: Positive = 175e9
    gpt3_flops: Positive = 3.14e23
    gpt3_cost_dollars: Positive = 4.6e6
    parameter_scale: Positive = KAPLAN_PARAMETERS.scale
    parameter_exponent: Positive = KAPLAN_PARAMETERS.exponent
    token_scale: Positive = KAPLAN_TOKENS.scale
    token_exponent: Positive = KAPLAN_TOKENS.exponent
    compute_coefficient: Positive = GPT3_COEFFICIENT
    compute_exponent: Positive = GPT3_EXPONENT
    crawl_bytes: Positive = 570e9
    crawl_tokens: Positive = 400e9
    a100_speedup: Positive = 6.0

    def loss_and_pf_days(self, parameters: float) -> tuple[float, float]:
        """Return the loss of a model of this size by L(N), and the PF-days at which L(C) reaches that loss."""
        loss = PowerLaw(self.parameter_scale, self.parameter_exponent).loss(parameters)
        return loss, (self.compute_coefficient / loss) ** (1 / self.compute_exponent)


def extrapolate(inputs: ForecastInputs | None = None) -> PlanSection:
    """Repeat the forecast of 2020: the next model is to GPT-3 what GPT-3 was to GPT-2.

    N = GPT-3's parameters times their ratio to GPT-2's; L(N) by Kaplan; the compute at which GPT-3's curve reaches
    that loss; and the tokens at which Kaplan's L(D) does, with as many bytes per token as GPT-3's crawl. The cost is
    GPT-3's cost times the ratio of compute. The forecast divides by the compute that the law gives for GPT-3; a second
    cost divides by the compute that GPT-3 took.

    Raises:
        InputError: where the forecast is beyond every number.
    """
    given = inputs or ForecastInputs()
    try:
        results = _results(given)
    except (OverflowError, ZeroDivisionError):
        raise InputError(
            "these inputs give a forecast that is too large to compute; use exponents near 0.05 to 0.1"
        ) from None
    words: dict[str, Any] = {
        "ratio": results["gpt3_flops_by_law"] / given.gpt3_flops,
        "by_law": format_value(results["gpt3_pf_days_by_law"], "PF-days"),
        "taken": format_value(results["gpt3_pf_days"], "PF-days"),
    }
    return plan_section("forecast", {**dataclasses.asdict(given), **results}, **words)


def _results(given: ForecastInputs) -> dict[str, float]:
    parameters = given.gpt3_parameters * (given.gpt3_parameters / given.gpt2_parameters)
    loss, pf_days = given.loss_and_pf_days(parameters)
    _, gpt3_pf_days = given.loss_and_pf_days(given.gpt3_parameters)
    flops = pf_days * FLOPS_PER_PF_DAY
    tokens = PowerLaw(given.token_scale, given.token_exponent).needed_for(loss)
    cost_by_law = given.gpt3_cost_dollars * pf_days / gpt3_pf_days
    return {
        "gpt3_pf_days": given.gpt3_flops / FLOPS_PER_PF_DAY,
        "gpt3_flops_by_law": gpt3_pf_days * FLOPS_PER_PF_DAY,
        "gpt3_pf_days_by_law": gpt3_pf_days,
        "parameters": parameters,
        "loss": loss,
        "flops": flops,
        "pf_days": pf_days,
        "tokens": tokens,
        "text_bytes": tokens * given.crawl_bytes / given.crawl_tokens,
        "cost_by_law": cost_by_law,
        "cost_by_law_on_a100": cost_by_law / given.a100_speedup,
        "cost": given.gpt3_cost_dollars * flops / given.gpt3_flops,
    }
