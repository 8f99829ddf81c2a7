"""What is recorded for reports: what the routers did, how large weights and updates are, a fixed slice of text.

Scalars of single steps go into ``metrics.jsonl``; arrays of evaluations into ``evaluations/step_XXXXXXXX.safetensors``.
Everything is of one step and of fixed text, so that an interrupted and resumed run records the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from moe_gpt.data.stream import Batch
from moe_gpt.files.durable import replace_file
from moe_gpt.inference.generate import SamplingConfig, generate
from moe_gpt.measure import routing
from moe_gpt.measure.health import Gradients
from moe_gpt.model.losses import RouterStats
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast
from moe_gpt.training.evaluation import Examined
from moe_gpt.training.step import MicroBatch, split_batch

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

EVALUATIONS = "evaluations"
_OBSERVED_TOKENS = 1024
"""Tokens of a recorded step whose router probabilities are looked at; loads are of all."""
_GRADIENT_TOKENS = 1024
"""Tokens of each source whose cross entropy is differentiated to see whether routers learn from it."""


class RoutingSample(NamedTuple):
    """What routers made of some tokens of a step's batch, before its update and without noise; on the device."""

    mean_probabilities: Tensor
    """Of each expert (L, E)."""
    token_entropy: Tensor
    """Mean entropy of a token's probabilities in nats (L,)."""
    first_weight: Tensor
    """Mean weight of the first choice (L,)."""
    margin: Tensor
    """Mean of the first choice's probability minus the largest other; a balancing bias can make it negative (L,)."""
    largest_logit: Tensor
    """Of any token and expert (L,)."""


@torch.no_grad()
def observe_routing(model: MoEGPT, batch: MicroBatch, precision: Precision) -> RoutingSample | None:
    """Return what the routers make of the first tokens of a micro-batch; None if the model is dense."""
    if model.config.is_dense:
        return None
    n_sequences = max(1, _OBSERVED_TOKENS // batch.inputs.shape[1])
    document_ids = None if batch.document_ids is None else batch.document_ids[:n_sequences]
    with evaluating(model), autocast(batch.inputs.device, precision):
        _, routings = model.hidden(batch.inputs[:n_sequences], document_ids=document_ids)
    probs = torch.stack([routing.router_probs for routing in routings])  # (L, N, E)
    first = torch.stack([routing.expert_indices[:, :1] for routing in routings])
    first_probs = probs.gather(2, first)
    return RoutingSample(
        mean_probabilities=probs.mean(dim=1),
        token_entropy=torch.special.entr(probs).sum(dim=2).mean(dim=1),
        first_weight=torch.stack([routing.expert_weights[:, 0].mean() for routing in routings]),
        margin=(first_probs - probs.scatter(2, first, 0.0).amax(dim=2, keepdim=True)).mean(dim=(1, 2)),
        largest_logit=torch.stack([routing.router_logits.amax() for routing in routings]),
    )


def describe_routing(stats: RouterStats, sample: RoutingSample) -> dict[str, list]:
    """Return a step's routing as lists over layers, for ``metrics.jsonl`` (docs/healthy-router.md has each formula).

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
        "dropped_fraction": stats.dropped_tokens / stats.tokens_per_expert.sum(dim=1).clamp(min=1),
    }
    return {
        name: np.round(np.asarray(torch.as_tensor(value).detach().cpu(), dtype=np.float64), 5).tolist()
        for name, value in values.items()
    }


def describe_norms(norms: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the norms of ``train.norms`` as ``{group: {kind: value}}``."""
    groups: dict[str, dict[str, float]] = {}
    for name, value in zip(norms, torch.stack(list(norms.values())).tolist(), strict=True):
        group, kind = name.split("/")
        groups.setdefault(group, {})[kind] = value
    return groups


def cross_entropy_gradients(
    model: MoEGPT, inputs: np.ndarray, targets: np.ndarray, precision: Precision, end_of_text_id: int | None = None
) -> Gradients:
    """Return what routers and experts would learn from cross entropy on (B, T) tokens; ``.grad`` stays as it is.

    With ``end_of_text_id`` documents are kept apart, as in training with ``data.document_masking``.
    """
    layers = model.moe_layers()
    device = model.embedding.weight.device
    (batch,) = split_batch(Batch(inputs, targets), inputs.size, device, end_of_text_id)
    with evaluating(model), torch.enable_grad(), autocast(device, precision), torch.compiler.set_stance("force_eager"):
        ce, _ = model.cross_entropy(batch.inputs, batch.targets, batch.document_ids)
    modules = [layer.router for layer in layers] + [layer.experts for layer in layers]
    parameters = [list(module.parameters()) for module in modules]
    flat = [parameter for group in parameters for parameter in group]
    gradients = iter(torch.autograd.grad(ce.total / ce.n_valid, flat, allow_unused=True))
    norms = []
    for group in parameters:
        parts = [gradient.float().norm() for _, gradient in zip(group, gradients, strict=False) if gradient is not None]
        norms.append(float(torch.stack(parts).norm()) if parts else 0.0)
    return Gradients(np.array(norms[: len(layers)]), np.array(norms[len(layers) :]))


@torch.inference_mode()
def choices_on(
    model: MoEGPT, tokens: np.ndarray, precision: Precision, end_of_text_id: int | None = None
) -> np.ndarray:
    """Return the experts that each token of (B, T) goes to, best first, (L, B, T, K); no layers if dense.

    With ``end_of_text_id`` documents are kept apart, as in training with ``data.document_masking``.
    """
    device = model.embedding.weight.device
    (batch,) = split_batch(Batch(tokens, tokens), tokens.size, device, end_of_text_id)
    with evaluating(model), autocast(device, precision):
        _, routings = model.hidden(batch.inputs, document_ids=batch.document_ids)
    dtype = np.uint8 if model.config.n_experts <= 256 else np.uint16
    choices = [r.expert_indices.cpu().numpy().astype(dtype).reshape(*tokens.shape, -1) for r in routings]
    return np.stack(choices) if choices else np.zeros((0, *tokens.shape, model.config.top_k), dtype)


def write_evaluation(
    run_dir: Path,
    step: int,
    model: MoEGPT,
    examined: dict[str, Examined],
    slices: dict[str, np.ndarray],
    precision: Precision,
    end_of_text_id: int | None = None,
) -> Gradients | None:
    """Write the arrays of an evaluation, and return its gradients: the same state gives the same bytes.

    For each source: ``<source>/nats`` and ``/counts`` by position (T,), ``/tokens_per_expert`` (L, E) over all held-out
    tokens, and of its slice ``/tokens`` (B, T) and ``/choices`` (L, B, T, K). ``gradients/routers`` and
    ``gradients/experts`` (L,) are those of cross entropy alone, on the first tokens of all slices.

    Args:
        run_dir: the run.
        step: completed optimizer steps.
        model: as it is after that step.
        examined: what the evaluator found.
        slices: tokens of each source whose experts are kept; empty for none.
        precision: compute type.
        end_of_text_id: given, documents are kept apart.

    Raises:
        OSError: where it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, found in examined.items():
        arrays |= {f"{name}/nats": found.nats, f"{name}/counts": found.counts}
        if found.tokens_per_expert is not None:
            arrays[f"{name}/tokens_per_expert"] = found.tokens_per_expert
    for name, tokens in slices.items():
        arrays[f"{name}/tokens"] = tokens.astype(np.int32)
        arrays[f"{name}/choices"] = choices_on(model, tokens, precision, end_of_text_id)
    gradients = mean_gradients(model, slices, precision, end_of_text_id)
    if gradients is not None:
        arrays |= {"gradients/routers": gradients.routers, "gradients/experts": gradients.experts}
    contents = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    replace_file(evaluation_file(run_dir, step), contents)
    return gradients


def mean_gradients(
    model: MoEGPT, slices: dict[str, np.ndarray], precision: Precision, end_of_text_id: int | None
) -> Gradients | None:
    """Return the root mean square over the slices of the gradients' norms on their first tokens; None if dense."""
    if model.config.is_dense or not slices:
        return None
    found = []
    for tokens in slices.values():
        few = tokens[: max(1, _GRADIENT_TOKENS // tokens.shape[1])]
        found.append(cross_entropy_gradients(model, few[:, :-1], few[:, 1:], precision, end_of_text_id))
    return Gradients(*(np.sqrt(np.square(norms).mean(axis=0)) for norms in zip(*found, strict=True)))


def evaluation_file(run_dir: Path, step: int) -> Path:
    """Return where the arrays of the evaluation after a step are."""
    return run_dir / EVALUATIONS / f"step_{step:08d}.safetensors"


def remove_later_evaluations(run_dir: Path, step: int) -> None:
    """Remove the arrays of evaluations after a step: they are from a part of the run that is done again."""
    for path in (run_dir / EVALUATIONS).glob("step_*.safetensors"):
        if path > evaluation_file(run_dir, step):
            path.unlink()


def score_line(examined: dict[str, Examined], samples: dict[str, str]) -> dict[str, Any]:
    """Return an evaluation as the keys of its line in ``metrics.jsonl``."""
    line: dict[str, Any] = {}
    for name, found in examined.items():
        score = found.score
        line |= {f"val/{name}/ce_loss": score.ce_loss, f"val/{name}/bits_per_byte": score.bits_per_byte}
    counts = [found.tokens_per_expert for found in examined.values() if found.tokens_per_expert is not None]
    if counts:
        line["val/max_violation"] = float(routing.max_violation(np.sum(counts, axis=0)).mean())
    if samples:
        line["samples"] = samples
    return line


def generate_samples(run: Run, n_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield each source's name, and its prompt with ``n_tokens`` generated after it; the same model gives the same."""
    tokenizer, limit = run.data.tokenizer, run.config.model.max_seq_len
    sampling = SamplingConfig(temperature=0.6, top_p=0.95)
    for index, source in enumerate(run.data.sources):
        prompt = tokenizer.encode(source.config.prompt)[: limit - 1]
        # single tokens would recompile what was compiled for batches
        with torch.compiler.set_stance("force_eager"):
            new = list(generate(run.state.model, prompt, n_tokens, sampling, index, tokenizer.end_of_text_id))
        yield source.config.name, tokenizer.decode([*prompt, *new])
