"""What the parameters of a model are, and which dense models have as many."""

from __future__ import annotations

from functools import cache

from moe_gpt.config import ModelConfig
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.quantities import PlanSection, plan_section

counts_of = cache(count_parameters)
"""``count_parameters``, once for each shape: every section of a plan needs them."""


def parameters_section(model: ModelConfig) -> PlanSection:
    """Say what the parameters are, and which dense models have as many."""
    counts = counts_of(model)
    experts = model.n_experts * counts.per_expert
    layers = counts.total - counts.embedding - model.d_model
    values = {
        "total": counts.total,
        "active": counts.active,
        "attention": counts.attention,
        "per_expert": counts.per_expert,
        "experts": experts,
        "router": counts.router,
        "embedding": counts.embedding,
        "norms": counts.total - counts.attention - experts - counts.router - counts.embedding,
        "per_layer": layers // model.n_layers,
        "per_layer_active": (layers - (model.n_experts - model.top_k) * counts.per_expert) // model.n_layers,
        "dense_of_same_active": counts.active - counts.router,
        "dense_of_same_total": counts.total - counts.router,
        "active_fraction": counts.active / counts.total,
    }
    d_ff = {"active_d_ff": model.top_k * model.d_ff, "total_d_ff": model.n_experts * model.d_ff}
    return plan_section("parameters", values, {"sharing": model.attention_sharing > 1}, **d_ff)
