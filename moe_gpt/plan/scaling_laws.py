"""Published scaling laws: the loss they predict, the sizes they call optimal, and the forecast that 2020 made of them.

Four laws that the reports on GPT-4 lean on, each with the constants that its paper prints: Kaplan et al. 2020 (arXiv
2001.08361), the GPT-3 paper's curve (arXiv 2005.14165, fig. 3.1), Hoffmann et al. 2022, called Chinchilla (arXiv
2203.15556), and Krajewski et al. 2024 for fine-grained mixtures of experts (arXiv 2402.07871). A loss is in nats per
token of that paper's own text and tokenizer, so losses of different laws do not compare.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.hardware import check_positive
from moe_gpt.plan.quantities import PlanSection, Quantity

FLOPS_PER_PF_DAY = 8.64e19
"""1e15 FLOP/s for a day (arXiv 2001.08361, section 1.3)."""
TOKENS_PER_PARAMETER = 20.0
"""The rule of thumb from Chinchilla's first approach (arXiv 2203.15556, table 3: 8 B tokens for 400 M and so on)."""
_KAPLAN, _GPT3 = "arXiv 2001.08361", "arXiv 2005.14165"
_CHINCHILLA, _REFIT, _KRAJEWSKI = "arXiv 2203.15556", "arXiv 2404.10102", "arXiv 2402.07871"


class PowerLaw(NamedTuple):
    """loss = (scale / x)^exponent, where x is the one thing that is scarce."""

    scale: float
    exponent: float

    def loss(self, x: float) -> float:
        """Return the loss in nats per token at x, in the unit of ``scale``."""
        _require_positive(x=x)
        return (self.scale / x) ** self.exponent

    def needed_for(self, loss: float) -> float:
        """Return the x at which the law gives this loss: the inverse of ``loss``."""
        _require_positive(loss=loss)
        return self.scale / loss ** (1 / self.exponent)


KAPLAN_PARAMETERS = PowerLaw(8.8e13, 0.076)
"""L(N), non-embedding parameters, data and compute plentiful (arXiv 2001.08361, eq. 1.1)."""
KAPLAN_TOKENS = PowerLaw(5.4e13, 0.095)
"""L(D), tokens of the training text, stopped early (eq. 1.2)."""
KAPLAN_COMPUTE = PowerLaw(3.1e8, 0.050)
"""L(C_min), PF-days, model and batch chosen optimally (eq. 1.3)."""
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
    _require_positive(n_parameters=n_parameters, n_tokens=n_tokens)
    return ((6.4e13 / n_parameters) ** (0.076 / 0.103) + 1.8e13 / n_tokens) ** 0.103


def kaplan_optimal(flops_budget: float) -> tuple[float, float]:
    """Return (N, D) = (1.3e9 · C^0.73, 2e10 · C^0.27), C in PF-days (arXiv 2001.08361, table 6, after eq. 1.7).

    Non-embedding parameters and tokens. The budget is C_min, what the run would take at batches far below the critical
    size; more tokens, and less growth of the model, is what Chinchilla found later.
    """
    _require_positive(flops_budget=flops_budget)
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
        _require_positive(n_parameters=n_parameters, n_tokens=n_tokens)
        of_size = self.parameter_factor / n_parameters**self.parameter_exponent
        return self.irreducible + of_size + self.token_factor / n_tokens**self.token_exponent

    def optimal(self, flops_budget: float) -> tuple[float, float]:
        """Return the (N, D) with the lowest loss where 6 N D is the budget (arXiv 2203.15556, eq. 4).

        N = G · (C/6)^(β/(α+β)) and D = (C/6)^(α/(α+β)) / G with G = (α A / (β B))^(1/(α+β)).
        """
        _require_positive(flops_budget=flops_budget)
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
    _require_positive(n_parameters=n_parameters, n_tokens=n_tokens, granularity=granularity)
    return 0.47 + (2.1 / granularity**0.58 + 18.1) / n_parameters**0.115 + 30.8 / n_tokens**0.147


def optimal_by_rule(flops_budget: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> tuple[float, float]:
    """Return (N, D) with D = tokens_per_parameter · N and 6 N D the budget: N = sqrt(C / (6 · 20))."""
    _require_positive(flops_budget=flops_budget, tokens_per_parameter=tokens_per_parameter)
    n_parameters = math.sqrt(flops_budget / (6 * tokens_per_parameter))
    return n_parameters, tokens_per_parameter * n_parameters


def predict_section(config: ModelConfig, tokens: float, granularity: float | None = None) -> PlanSection:
    """Return the loss that each law predicts for a shape and a number of training tokens.

    Args:
        config: the shape.
        tokens: seen in training, repeated ones counted again.
        granularity: for the fine-grained law; null is top_k, which takes the experts of a token together for the
            layer that they replace.
    """
    _require_positive(tokens=tokens)
    granularity = config.top_k if granularity is None else granularity
    counts = count_parameters(config)
    total, active = counts.total - counts.embedding, counts.active - counts.embedding
    pf_days = 6 * counts.active * tokens / FLOPS_PER_PF_DAY
    chinchilla, refit = f"{_CHINCHILLA} eq. 10", f"{_REFIT}, fit to the points of {_CHINCHILLA} fig. 4"
    law = "E + A / N^alpha + B / D^beta"
    rows = [
        ("kaplan_active", kaplan_loss(active, tokens), "Kaplan, active parameters", "L(N, D)", f"{_KAPLAN} eq. 1.5"),
        ("kaplan_total", kaplan_loss(total, tokens), "Kaplan, all parameters", "L(N, D)", f"{_KAPLAN} eq. 1.5"),
        (
            "gpt3_compute", GPT3_COMPUTE.loss(pf_days), "GPT-3's curve, compute of active parameters",
            "2.57 · C^-0.048, C = 6 N D in PF-days", f"{_GPT3} fig. 3.1",
        ),
        ("chinchilla_active", CHINCHILLA.loss(counts.active, tokens), "Chinchilla, active parameters", law, chinchilla),
        ("chinchilla_total", CHINCHILLA.loss(counts.total, tokens), "Chinchilla, all parameters", law, chinchilla),
        ("refit_active", CHINCHILLA_REFIT.loss(counts.active, tokens), "Chinchilla refitted, active", law, refit),
        ("refit_total", CHINCHILLA_REFIT.loss(counts.total, tokens), "Chinchilla refitted, all", law, refit),
        (
            "fine_grained_dense", KRAJEWSKI_DENSE.loss(active, tokens), "Krajewski, dense of the active size",
            "c + a / N^alpha + b / D^beta", f"{_KRAJEWSKI} table 1, dense",
        ),
    ]  # fmt: skip
    if not config.is_dense:
        loss = krajewski_loss(total, tokens, granularity)
        formula = f"c + (g / G^gamma + a) / N^alpha + b / D^beta, G = {granularity:g}"
        rows.append(("fine_grained", loss, "Krajewski, fine-grained MoE", formula, f"{_KRAJEWSKI} eq. 9, table 1"))
    return PlanSection(
        name="predicted_loss",
        title="Loss that published laws predict (nats per token of each paper's own text)",
        quantities=[
            Quantity("tokens", tokens, "tokens", "training tokens, D", "given", "given"),
            *(Quantity(name, loss, "nats/token", label, how, source) for name, loss, label, how, source in rows),
        ],
        notes=_prediction_notes(config, granularity),
    )


def _prediction_notes(config: ModelConfig, granularity: float) -> list[str]:
    notes = [
        "Each law was fitted to its authors' text, tokenizer and context, on models of at most a few billion "
        "parameters (16 B for Chinchilla): compare runs within a row, never rows with each other or with a loss of "
        "your own.",
        "Every token counts as new: repeated epochs teach less than the laws say.",
    ]
    if config.is_dense:
        return notes
    return [
        *notes,
        "Kaplan, GPT-3 and Chinchilla are about dense models. For a mixture of experts the row of the active "
        "parameters is the pessimist's and that of all parameters the optimist's.",
        f"Krajewski's law was fitted at 64 times the parameters of a dense layer, here {config.n_experts} experts of "
        f"which {config.top_k} are used; granularity {granularity:g}.",
    ]


def optimal_section(flops_budget: float) -> PlanSection:
    """Return the parameters and tokens that spend a training budget best, by each law for dense models."""
    formula = "N = G (C/6)^(beta/(alpha+beta)), D = C / (6 N), G = (alpha A / (beta B))^(1/(alpha+beta))"
    laws = (
        ("chinchilla", "Chinchilla", CHINCHILLA, f"{_CHINCHILLA} eq. 4 with the rounded constants of eq. 10"),
        ("unrounded", "Chinchilla, unrounded", CHINCHILLA_UNROUNDED, f"{_CHINCHILLA} eq. 4, constants of its TeX"),
        ("refit", "Chinchilla refitted", CHINCHILLA_REFIT, f"{_CHINCHILLA} eq. 4, constants of {_REFIT}"),
    )
    quantities = [Quantity("flops_budget", flops_budget, "FLOPs", "training budget, C", "given", "given")]
    n, d = optimal_by_rule(flops_budget)
    source, rule = f"{_CHINCHILLA} table 3 (approach 1)", "C = 6 N D, D = 20 N"
    quantities += _optimum("rule_of_20", "20 tokens per parameter", n, d, rule, source)
    for name, label, law, source in laws:
        n, d = law.optimal(flops_budget)
        quantities += _optimum(name, label, n, d, formula, source)
        loss = law.loss(n, d)
        quantities.append(
            Quantity(f"{name}_loss", loss, "nats/token", f"{label}: loss there", "E + A / N^alpha + B / D^beta", source)
        )
    n, d = kaplan_optimal(flops_budget)
    powers = "N = 1.3e9 C^0.73, D = 2e10 C^0.27, C in PF-days"
    quantities += _optimum("kaplan", "Kaplan (2020)", n, d, powers, f"{_KAPLAN} table 6; N without embeddings")
    return PlanSection(
        name="optimal_size",
        title="Parameters and tokens that spend the budget best (dense models)",
        quantities=quantities,
        notes=[
            "Kaplan's N and D are two fits of their own: their 6 N D is not the budget.",
            "Chinchilla's third approach, with its constants rounded as printed, asks for fewer parameters than the "
            "paper's own figures: 32 B instead of 40 B for Gopher's 5.76e23 FLOPs. Its first approach says 67 B.",
            "The optimum is the lowest loss for the training budget; a model that will serve many tokens is better "
            "smaller and trained longer.",
        ],
    )


def _optimum(name: str, label: str, n: float, d: float, formula: str, source: str) -> list[Quantity]:
    return [
        Quantity(f"{name}_parameters", n, "parameters", f"{label}: parameters, N", formula, source),
        Quantity(f"{name}_tokens", d, "tokens", f"{label}: tokens, D", formula, source),
    ]


def extrapolate(
    *,
    gpt2_parameters: float = 1.5e9,
    gpt3_parameters: float = 175e9,
    gpt3_flops: float = 3.14e23,
    gpt3_cost_dollars: float = 4.6e6,
    parameter_scale: float = KAPLAN_PARAMETERS.scale,
    parameter_exponent: float = KAPLAN_PARAMETERS.exponent,
    token_scale: float = KAPLAN_TOKENS.scale,
    token_exponent: float = KAPLAN_TOKENS.exponent,
    compute_coefficient: float = GPT3_COEFFICIENT,
    compute_exponent: float = GPT3_EXPONENT,
) -> PlanSection:
    """Repeat the forecast of 2020: the next model is to GPT-3 what GPT-3 was to GPT-2.

    N = GPT-3's parameters times their ratio to GPT-2's; L(N) by Kaplan; the compute at which GPT-3's curve reaches
    that loss; the tokens at which Kaplan's L(D) does; and GPT-3's cost times the ratio of compute. Dollars are those
    of whoever estimated GPT-3's cost: no hardware gets cheaper here.

    Raises:
        InputError: naming the argument that is not above 0.
    """
    inputs = _forecast_inputs(dict(locals()))
    _require_positive(**{quantity.name: quantity.value for quantity in inputs})  # type: ignore[arg-type]
    try:
        parameters = gpt3_parameters * (gpt3_parameters / gpt2_parameters)
        loss = PowerLaw(parameter_scale, parameter_exponent).loss(parameters)
        flops = (compute_coefficient / loss) ** (1 / compute_exponent) * FLOPS_PER_PF_DAY
        tokens = PowerLaw(token_scale, token_exponent).needed_for(loss)
        cost = gpt3_cost_dollars * flops / gpt3_flops
    except (OverflowError, ZeroDivisionError):
        raise InputError(
            "these inputs give a forecast beyond every number; take exponents nearer to 0.05 to 0.1"
        ) from None
    ours = "the forecast's assumption"
    return PlanSection(
        name="forecast",
        title="The forecast of 2020: GPT-4 is to GPT-3 as GPT-3 is to GPT-2",
        quantities=[
            *inputs,
            Quantity(
                "parameters", parameters, "parameters", "forecast: parameters, N",
                "gpt3_parameters^2 / gpt2_parameters", ours,
            ),
            Quantity(
                "loss", loss, "nats/token", "forecast: loss", "(parameter_scale / N)^parameter_exponent",
                f"{_KAPLAN} eq. 1.1",
            ),
            Quantity(
                "flops", flops, "FLOPs", "forecast: training compute, C",
                "(compute_coefficient / loss)^(1 / compute_exponent) PF-days of 8.64e19 FLOPs", f"{_GPT3} fig. 3.1",
            ),
            Quantity(
                "tokens", tokens, "tokens", "forecast: tokens, D", "token_scale / loss^(1 / token_exponent)",
                f"{_KAPLAN} eq. 1.2",
            ),
            Quantity(
                "cost", cost, "dollars", "forecast: cost of the compute", "gpt3_cost_dollars · C / gpt3_flops", ours
            ),
        ],
        notes=[
            "A forecast as it was made, not advice: Kaplan's laws grow the model too fast (see optimal_size), and "
            "C, N and D need not satisfy C = 6 N D, since three separate fits give them.",
            "L(N) is the loss of a model trained until it learns no more. With the default inputs GPT-3 would have "
            "taken 5 times the compute that it took.",
        ],
    )  # fmt: skip


def _forecast_inputs(given: dict[str, float]) -> list[Quantity]:
    curve = f"{_GPT3} fig. 3.1: 2.57 · C^-0.048, C in PF-days"
    described: tuple[tuple[str, str, str, str], ...] = (
        ("gpt2_parameters", "parameters", "input: parameters of GPT-2", "GPT-2 report (Radford et al. 2019), table 2"),
        ("gpt3_parameters", "parameters", "input: parameters of GPT-3", f"{_GPT3} table 2.1"),
        ("gpt3_flops", "FLOPs", "input: training compute of GPT-3", f"{_GPT3} table D.1"),
        ("gpt3_cost_dollars", "dollars", "input: cost of GPT-3", "public estimate of 2020 from list prices"),
        ("parameter_scale", "parameters", "input: N_c of L(N)", f"{_KAPLAN} eq. 1.1"),
        ("parameter_exponent", "count", "input: alpha_N of L(N)", f"{_KAPLAN} eq. 1.1"),
        ("token_scale", "tokens", "input: D_c of L(D)", f"{_KAPLAN} eq. 1.2"),
        ("token_exponent", "count", "input: alpha_D of L(D)", f"{_KAPLAN} eq. 1.2"),
        ("compute_coefficient", "count", "input: coefficient of L(C)", curve),
        ("compute_exponent", "count", "input: exponent of L(C)", curve),
    )
    return [
        Quantity(name, given[name], unit, label, "given", source)  # type: ignore[arg-type]
        for name, unit, label, source in described
    ]


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        check_positive(name, value)
