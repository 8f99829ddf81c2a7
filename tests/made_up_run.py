"""A run that never happened, as the reader would return it: small, quick, with everything that a run records."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe_gpt.measure.health import Gradients
from moe_gpt.report.recorded import EvaluationArrays, RunRecords, Slice

L, E, K, V, T = 2, 4, 2, 50, 80
SOURCES = ("prose", "code")
MODEL = {
    "vocab_size": V, "n_layers": L, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 16,
    "n_experts": E, "top_k": K, "max_seq_len": T,
}  # fmt: skip
STAGES = [
    {"until_tokens": 1000, "seq_len": 40, "batch_tokens": 40},
    {"until_tokens": 3000, "seq_len": T, "batch_tokens": [80, 160]},
]


class FakeTokenizer:
    """Token 0 ends a line, 1 is a space, 2 is hostile, the rest are their number."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of the tokens."""
        return "".join({0: "\n", 1: " ", 2: "<script>alert(2)</script>"}.get(token, f"t{token}") for token in tokens)


def make_step(step: int, **changes: Any) -> dict[str, Any]:
    """Return a step's line; 100 tokens each."""
    line = {"step": step, "tokens_seen": 100 * step, "seq_len": T, "batch_tokens": 100, "lr": 1e-3 / step}
    line |= {"ce_loss": 1 + 3 / step, "dropped_fraction": 0.0, "skipped": False, "tokens_per_second": 1000.0}
    return line | changes


def make_record(step: int) -> dict[str, Any]:
    """Return a recorded step's line."""
    load = [[1.6, 0.8, 0.8, 0.8]] * L
    by_layer = {"max_violation": 0.6, "dead_experts": 0, "token_entropy": 0.5, "mean_probability_entropy": 0.9}
    by_layer |= {"first_weight": 0.7, "margin": 0.3, "largest_logit": 4.0, "router_z_loss": 2.0}
    by_layer |= {"load_balancing_loss": 1.1, "dropped_fraction": 0.0}
    norms = {"gradient_norm": 0.1, "parameter_norm": 10.0, "update_norm": 0.01 / step}
    routing = {"load": load, **{key: [value] * L for key, value in by_layer.items()}}
    return {"step": step, "tokens_seen": 100 * step, "groups": {"routers": norms, "experts": norms}, "routing": routing}


def make_evaluation(step: int, loss: float, sources: tuple[str, ...] = SOURCES) -> dict[str, Any]:
    """Return an evaluation's line."""
    line: dict[str, Any] = {"step": step, "tokens_seen": 100 * step, "samples": {s: f"text of {s}" for s in sources}}
    for source in sources:
        line |= {f"val/{source}/ce_loss": loss, f"val/{source}/bits_per_byte": loss / 2}
    return line | {"val/max_violation": 0.6}


def make_arrays(step: int, loss: float, sources: tuple[str, ...] = SOURCES) -> EvaluationArrays:
    """Return an evaluation's arrays; prose prefers expert 0, every other source expert 1, more so in layer 1."""
    generator, tokens_per_expert, slices = np.random.default_rng(step), {}, {}
    for index, source in enumerate(sources):
        counts = np.full((L, E), 100)
        counts[1, min(index, 1)] = 500
        tokens_per_expert[source] = counts
        order = np.argsort(generator.random((L, 2, T, E)), axis=-1)[..., :K].astype(np.uint8)
        slices[source] = Slice(np.arange(2 * T).reshape(2, T) % 6, order)
    return EvaluationArrays(
        step=step,
        nats=dict.fromkeys(sources, np.linspace(1.1, 0.9, T) * 7 * loss),
        counts=dict.fromkeys(sources, np.full(T, 7)),
        tokens_per_expert=tokens_per_expert,
        slices=slices,
        gradients=Gradients(np.full(L, 0.01), np.full(L, 0.1)),
    )


def make_run(sources: tuple[str, ...] = SOURCES, **changes: Any) -> RunRecords:
    """Return a run of 30 steps with evaluations at steps 0, 15 and 30, whose loss falls from ln(V) to 2."""
    losses = {0: math.log(V), 15: 2.5, 30: 2.0}
    run = RunRecords(
        name="made-up",
        run_dir=Path("made-up"),
        config={
            "model": MODEL,
            "data": {"sources": [{"name": source} for source in sources]},
            "schedule": {"stages": STAGES},
            "train": {"record_every_steps": 5},
            "faults": {"routing_window": 5},
        },
        steps=[make_step(step) for step in range(1, 31)],
        records=[make_record(step) for step in range(5, 31, 5)],
        evaluations=[make_evaluation(step, loss, sources) for step, loss in losses.items()],
        events=[{"time": "2026-01-01T00:00:00+00:00", "kind": "start", "step": 0, "changes": []}],
        arrays=[make_arrays(step, loss, sources) for step, loss in losses.items()],
        tokenizer=FakeTokenizer(),  # type: ignore[arg-type]
        tokenizer_digest="1",
        notes=[],
    )
    return dataclasses.replace(run, **changes)
