"""The contents of a line of ``metrics.jsonl`` for a recorded step or an evaluation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_gpt.measure import routing
from moe_gpt.measure.metric_names import VALIDATION, MetricName
from moe_gpt.measure.observation import RoutingSample
from moe_gpt.model.losses import RouterStats
from moe_gpt.training.evaluation import SourceEvaluation


def describe_routing(stats: RouterStats, sample: RoutingSample) -> dict[str, list]:
    """Return a step's routing as lists over layers (docs/healthy-router.md has each formula).

    Loads, losses and drops are those of the whole batch.
    """
    counts, n_experts = stats.tokens_per_expert.cpu().numpy(), stats.tokens_per_expert.shape[1]
    values = {
        "load": routing.load(counts),
        "max_violation": routing.max_violation(counts),
        "dead_experts": routing.dead_experts(counts).sum(axis=1),
        "token_entropy": sample.token_entropy / math.log(n_experts),
        "mean_probability_entropy": torch.special.entr(sample.mean_probabilities).sum(dim=1) / math.log(n_experts),
        "first_weight": sample.first_weight,
        "margin": sample.margin,
        "largest_logit": sample.largest_logit,
        "router_z_loss": stats.router_z_loss,
        "load_balancing_loss": stats.load_balancing_loss,
        "dropped_fraction": stats.dropped_assignments / stats.tokens_per_expert.sum(dim=1).clamp(min=1),
    }
    return {
        name: np.round(np.asarray(torch.as_tensor(value).detach().cpu(), dtype=np.float64), 5).tolist()
        for name, value in values.items()
    }


def describe_norms(norms: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the norms of ``records.norms`` as ``{group: {kind: value}}``."""
    groups: dict[str, dict[str, float]] = {}
    for name, value in zip(norms, torch.stack(list(norms.values())).tolist(), strict=True):
        group, kind = name.split("/")
        groups.setdefault(group, {})[kind] = value
    return groups


def score_line(evaluations: dict[str, SourceEvaluation], samples: dict[str, str]) -> dict[str, Any]:
    """Return an evaluation as the keys of its line in ``metrics.jsonl``."""
    line: dict[str, Any] = {
        str(MetricName(name, key)): getattr(found.score, key)
        for name, found in evaluations.items()
        for key in ("ce_loss", "bits_per_byte")
    }
    counts = [found.tokens_per_expert for found in evaluations.values() if found.tokens_per_expert is not None]
    if counts:
        line[f"{VALIDATION}max_violation"] = float(routing.max_violation(np.sum(counts, axis=0)).mean())
    if samples:
        line["samples"] = samples
    return line
