"""What a model does with some tokens: what its routers decide, and what they would learn.

With ``end_of_text_id`` documents are kept apart, as in training with ``data.document_masking``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_gpt.data.batches import MicroBatch, split_batch
from moe_gpt.data.stream import Batch
from moe_gpt.measure.health import Gradients
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast, without_compiler

OBSERVED_TOKENS = 1024
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
    n_sequences = max(1, OBSERVED_TOKENS // batch.inputs.shape[1])
    document_ids = None if batch.document_ids is None else batch.document_ids[:n_sequences]
    with evaluating(model), autocast(batch.inputs.device, precision):
        routings = model.routings(batch.inputs[:n_sequences], document_ids)
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


def cross_entropy_gradients(
    model: MoEGPT, inputs: np.ndarray, targets: np.ndarray, precision: Precision, end_of_text_id: int | None = None
) -> Gradients:
    """Return what routers and experts would learn from cross entropy on (B, T) tokens; ``.grad`` stays as it is."""
    layers, device = model.moe_layers(), model.embedding.weight.device
    (batch,) = split_batch(Batch(inputs, targets), inputs.size, device, end_of_text_id)
    with evaluating(model), _thawed(model), torch.enable_grad(), autocast(device, precision), without_compiler():
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


@contextlib.contextmanager
def _thawed(model: MoEGPT) -> Iterator[None]:
    """Let all parameters take gradients for a while, frozen ones too."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@torch.inference_mode()
def choices_on(
    model: MoEGPT, tokens: np.ndarray, precision: Precision, end_of_text_id: int | None = None
) -> np.ndarray:
    """Return the experts that each token of (B, T) goes to, best first, (L, B, T, K); no layers if dense."""
    device = model.embedding.weight.device
    (batch,) = split_batch(Batch(tokens, tokens), tokens.size, device, end_of_text_id)
    with evaluating(model), autocast(device, precision):
        routings = model.routings(batch.inputs, batch.document_ids)
    dtype = np.uint8 if model.config.n_experts <= 256 else np.uint16
    choices = [r.expert_indices.cpu().numpy().astype(dtype).reshape(*tokens.shape, -1) for r in routings]
    return np.stack(choices) if choices else np.zeros((0, *tokens.shape, model.config.top_k), dtype)


def mean_gradients(
    model: MoEGPT, slices: dict[str, np.ndarray], precision: Precision, end_of_text_id: int | None
) -> Gradients | None:
    """Return the root mean square over the slices of the gradients' norms on their first tokens; None if dense."""
    slices = {source: tokens for source, tokens in slices.items() if tokens.shape[1] > 1}  # one token predicts nothing
    if model.config.is_dense or not slices:
        return None
    found = []
    for tokens in slices.values():
        few = tokens[: max(1, _GRADIENT_TOKENS // tokens.shape[1])]
        found.append(cross_entropy_gradients(model, few[:, :-1], few[:, 1:], precision, end_of_text_id))
    return Gradients(*(np.sqrt(np.square(norms).mean(axis=0)) for norms in zip(*found, strict=True)))
