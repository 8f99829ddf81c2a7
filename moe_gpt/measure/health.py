"""Is the router healthy? What the recorded values say, in words, and what to try.

Thresholds were set between healthy tiny runs and runs broken on purpose (tests/trained_routers.py trains both);
docs/healthy-router.md lists them beside the values of published models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_gpt.config import FaultConfig, ModelConfig

Records = Sequence[Mapping[str, Any]]
"""The ``routing`` of recorded steps of metrics.jsonl, oldest first."""
_GROWTH_OF_IMBALANCE = 1.5
_SEVERE_IMBALANCE = 0.4
"""Share of the largest possible violation, E / K - 1."""
_GROWTH_OF_Z, _LARGE_Z = 1.5, 25.0
_LEAST_INFORMATION = 0.005
_LEAST_GRADIENT_RATIO = 1e-3

_ADVICE_ON_BALANCE = {
    "loss": "raise loss.load_balancing_loss_weight, or lower optimizer.lr",
    "bias": "raise model.bias_update_rate, or lower optimizer.lr",
    "none": "use model.balance=loss or model.balance=bias",
}


class RouterProblem(NamedTuple):
    """Something that is wrong with a layer's router."""

    kind: str
    layer: int
    text: str
    advice: str


class Gradients(NamedTuple):
    """Norms by layer (L,) of the gradients of cross entropy alone, from one evaluation."""

    routers: np.ndarray
    experts: np.ndarray


def find_problems(
    records: Records, gradients: Gradients | None, model: ModelConfig, faults: FaultConfig, record_every_steps: int
) -> list[RouterProblem]:
    """Return what is wrong at the last of the records; nothing for a healthy router, a dense model or no records.

    Only the newest of the records are looked at. The gradients are those of the newest evaluation after a step.
    """
    if model.is_dense:
        return []
    window = recorded_window(faults, record_every_steps)
    problems: list[RouterProblem] = []
    if len(records) >= window:
        problems += _problems_of_load(records[-window:], model, faults)
    if len(records) >= 3 * window:
        problems += _problems_of_growth(records[-3 * window :], window, model)
        problems += _problems_of_information(records[-window:], model)
    if gradients is not None:
        problems += _problems_of_learning(gradients, model)
    return problems


def recorded_window(faults: FaultConfig, record_every_steps: int) -> int:
    """Return how many recorded steps are looked at together; growth is judged over three times as many."""
    return max(1, faults.routing_window // max(1, record_every_steps))


def _mean(records: Records, key: str) -> np.ndarray:
    """Return the mean over records of a value by layer (L, ...); nan where a step was not finite."""
    return np.mean([np.array(record[key], dtype=float) for record in records], axis=0)


def _problems_of_load(records: Records, model: ModelConfig, faults: FaultConfig) -> Iterator[RouterProblem]:
    advice = _ADVICE_ON_BALANCE[model.balance]
    for layer, loads in enumerate(_mean(records, "load")):
        dead = np.flatnonzero(loads < faults.dead_expert_load).tolist()
        share = np.sort(loads)[-model.top_k :].sum() / len(loads)
        if dead:
            text = f"experts {', '.join(map(str, dead))} of {len(loads)} are nearly unused"
            yield RouterProblem("dead_experts", layer, text, advice)
        if share > faults.collapsed_share and model.n_experts > model.top_k:
            text = f"{model.top_k} of {len(loads)} experts get {share:.0%} of all assignments"
            yield RouterProblem("routing_collapsed", layer, text, advice)


def _problems_of_growth(records: Records, window: int, model: ModelConfig) -> list[RouterProblem]:
    parts = [records[start : start + window] for start in range(0, 3 * window, window)]
    severe, problems = _SEVERE_IMBALANCE * (model.n_experts / model.top_k - 1), []
    for layer, first, last in _grown(parts, "max_violation", _GROWTH_OF_IMBALANCE, severe):
        text = f"imbalance grows: the busiest expert had {1 + first:.1f} times the mean load, now {1 + last:.1f}"
        problems.append(RouterProblem("imbalance_growing", layer, text, _ADVICE_ON_BALANCE[model.balance]))
    for layer, first, last in _grown(parts, "router_z_loss", _GROWTH_OF_Z, _LARGE_Z):
        text = f"router logits grow: z loss {first:.0f} before, {last:.0f} now"
        problems.append(
            RouterProblem("z_growing", layer, text, "raise loss.router_z_loss_weight, or lower optimizer.lr")
        )
    return sorted(problems, key=lambda problem: problem.layer)


def _grown(parts: Sequence[Records], key: str, factor: float, limit: float) -> Iterator[tuple[int, float, float]]:
    """Yield layer, first and last mean where a value (L,) rose twice, by ``factor`` in all, beyond ``limit``."""
    first, middle, last = (_mean(part, key) for part in parts)
    has_grown = (first < middle) & (middle < last) & (last > factor * first) & (last > limit)
    for layer in np.flatnonzero(has_grown).tolist():
        yield layer, float(first[layer]), float(last[layer])


def _problems_of_information(records: Records, model: ModelConfig) -> Iterator[RouterProblem]:
    information = _mean(records, "mean_probability_entropy") - _mean(records, "token_entropy")
    for layer, value in enumerate(information):
        if value < _LEAST_INFORMATION:
            share = f"{value:.2%} of the information that they could give about the token"
            text = f"routing hardly depends on the input: the router's probabilities give {share}"
            advice = "lower loss.load_balancing_loss_weight or loss.router_z_loss_weight, or raise optimizer.lr"
            yield RouterProblem("routing_ignores_input", layer, text, advice)


def _problems_of_learning(gradients: Gradients, model: ModelConfig) -> Iterator[RouterProblem]:
    for layer, (router, expert) in enumerate(zip(gradients.routers, gradients.experts, strict=True)):
        if router < _LEAST_GRADIENT_RATIO * expert:
            norms = f"its gradient is {router:.1e}, the experts' {expert:.1e}"
            text = f"the router does not learn from cross entropy: {norms}"
            advice = "see that nothing detaches the weights of the chosen experts"
            yield RouterProblem("router_not_learning", layer, text, advice)
