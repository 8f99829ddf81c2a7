"""What the parameters of a model are, and which dense models have as many."""

from __future__ import annotations

from moe_gpt.config import ModelConfig
from moe_gpt.measure.parameters import ParameterCounts, count_parameters
from moe_gpt.plan.quantities import PlanSection, Quantity


def parameters_section(config: ModelConfig, counts: ParameterCounts | None = None) -> PlanSection:
    """Say what the parameters are, and which dense models have as many.

    Args:
        config: the shape.
        counts: of the same config, where they are known already.
    """
    counts = counts or count_parameters(config)
    experts = config.n_experts * counts.per_expert
    norms = counts.total - counts.attention - experts - counts.router - counts.embedding
    layers = counts.total - counts.embedding - config.d_model
    dense_d_ff = config.top_k * config.d_ff

    def counted(name: str, value: int, label: str, formula: str = "read off the model built on meta") -> Quantity:
        return Quantity(name, value, "parameters", label, formula, "counted")

    return PlanSection(
        "parameters",
        "Parameters",
        [
            counted("total", counts.total, "Total"),
            counted("active", counts.active, "Active per token", "total - (n_experts - top_k) per_expert"),
            counted("attention", counts.attention, "Attention, shared by all experts"),
            counted("per_expert", counts.per_expert, "One expert, all layers together"),
            counted("experts", experts, "All experts", "n_experts per_expert"),
            counted("router", counts.router, "Routers"),
            counted("embedding", counts.embedding, "Embedding, and output matrix where it is not tied"),
            counted("norms", norms, "Norms", "total - attention - experts - router - embedding"),
            counted("per_layer", layers // config.n_layers, "One layer", "(total - embedding - d_model) / n_layers"),
            counted(
                "per_layer_active",
                (layers - (config.n_experts - config.top_k) * counts.per_expert) // config.n_layers,
                "One layer, active per token",
                "per_layer - (n_experts - top_k) per_expert / n_layers",
            ),
            counted(
                "dense_of_same_active",
                counts.active - counts.router,
                f"Dense model that computes as much for a token (d_ff {dense_d_ff:,})",
                "active - router: one feed-forward network of d_ff top_k in each layer",
            ),
            counted(
                "dense_of_same_total",
                counts.total - counts.router,
                f"Dense model that stores as much (d_ff {config.n_experts * config.d_ff:,})",
                "total - router: one feed-forward network of d_ff n_experts in each layer",
            ),
            Quantity(
                "active_fraction",
                counts.active / counts.total,
                "fraction",
                "Active of all",
                "active / total",
                "counted",
            ),
        ],
        notes=[] if config.attention_sharing == 1 else ["Layers that share attention share its parameters, too."],
    )
