"""What this project itself needs: the memory of a training step on a CPU in float32.

The activations are those that the paths of ``moe_gpt.model`` for CPUs keep for the backward pass, tensor by tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_gpt.config import ModelConfig, RunConfig, StageConfig
from moe_gpt.measure.parameters import ParameterCounts, count_parameters, model_of
from moe_gpt.ops.cpu_attention import LONGEST_BY_PRODUCTS, QUERY_BLOCK
from moe_gpt.ops.device import Precision
from moe_gpt.ops.dispatch import count_rows, segment_alignment
from moe_gpt.terminal.numbers import format_value

_CPU = torch.device("cpu")
_FLOAT = 4
_LONG = 8
_HEAP_HOLES = 1.17
"""Memory that the heap takes to what is alive at once: measured 1.12 (shape M), 1.17 (S) and 1.26 (tiny)."""
_LIBRARIES = 104_000_000
"""Code and buffers of torch that the first step loads, whatever the model: measured."""


class KeptActivations(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass."""

    layer: int
    """Of each layer."""
    outside: int
    """Of the ends: final norm, and the loss with its gradients."""


class NeededMemory(NamedTuple):
    """What training takes of the device's memory."""

    bytes: int
    is_lower_bound: bool
    """Whether activations come on top."""

    def shown(self) -> str:
        """Return it in words."""
        return f"{'more than' if self.is_lower_bound else 'about'} {format_value(self.bytes, 'bytes')}"


def needed_memory(
    config: RunConfig, device: torch.device, precision: Precision, counts: ParameterCounts | None = None
) -> NeededMemory:
    """Return what this project's own training takes: predicted in float32 on a CPU, elsewhere what is certain.

    What is certain are weights and gradients in float32, and the optimizer's running means.
    """
    counts = counts or count_parameters(model_of(config))
    if device.type == "cpu" and precision == "fp32":
        return NeededMemory(predict_training_memory_cpu(config, counts), is_lower_bound=False)
    return NeededMemory(2 * _FLOAT * counts.total + _state_bytes(config, counts), is_lower_bound=True)


def predict_training_memory_cpu(config: RunConfig, counts: ParameterCounts | None = None) -> int:
    """Return the peak memory in bytes of a float32 training step on a CPU, beyond the imported torch.

    Weights, moments, and of gradients and activations what is alive at the worst time of a backward pass: at its start
    all activations and the first gradients, at its end one layer's activations and all gradients. Evaluation, recording
    and saving in the background, which copies 12 bytes a parameter, come on top.
    """
    counts = counts or count_parameters(model_of(config))
    alive = max(_alive(config, stage, counts) for stage in config.schedule.stages)
    return round(_HEAP_HOLES * alive) + _LIBRARIES


def _alive(config: RunConfig, stage: StageConfig, counts: ParameterCounts) -> int:
    model, recompute = model_of(config), config.train.activation_checkpointing
    n_sequences = max(1, min(config.train.micro_batch_tokens, max(stage.batch_range)) // stage.seq_len)
    tokens = n_sequences * stage.seq_len
    kept = kept_activation_bytes(model, n_sequences, stage.seq_len, config.data.document_masking)
    layer_kept = _kept_when_recomputed(model, tokens) if recompute else kept.layer
    layer_gradients = _FLOAT * (counts.total - counts.embedding) // model.n_layers
    output_gradient = _FLOAT * (model.vocab_size or 1) * model.d_model
    within_layer = _transient_bytes(model, tokens) + layer_gradients + (kept.layer if recompute else 0)
    start = output_gradient + model.n_layers * layer_kept + kept.outside
    end = output_gradient + (model.n_layers - 1) * layer_gradients + layer_kept
    return _FLOAT * counts.total + _state_bytes(config, counts) + within_layer + max(start, end)


def _state_bytes(config: RunConfig, counts: ParameterCounts) -> int:
    """Return what the optimizer's running means take: two of each number; of what Muon moves, one.

    With adapters they are small; the adapted weights, which the backward pass needs, count instead.
    """
    if config.adapters:
        return _FLOAT * counts.total
    n_ends = counts.embedding * (1 if model_of(config).tie_embeddings else 2)
    n_means = 2 * counts.total - (counts.total - n_ends) * (config.optimizer.name == "muon")
    return round({"float32": 4, "bfloat16": 2, "int8": 1 + _FLOAT / 256}[config.optimizer.state_type] * n_means)


def kept_activation_bytes(
    model: ModelConfig, n_sequences: int, seq_len: int, keeps_documents_apart: bool = False
) -> KeptActivations:
    """Return what a forward pass on a CPU in float32 keeps: the storages that autograd holds, weights left out."""
    N, D, H, G, Dh = n_sequences * seq_len, model.d_model, model.n_heads, model.n_kv_heads, model.head_dim
    norm = _FLOAT * (2 * N * D + N)  # before and after its weight, and the root mean squares
    rotated = _FLOAT * N * (H + G) * Dh
    # values are a view of the joint projection; keys and values of several heads are copied for products
    is_copied = G > 1 and seq_len <= LONGEST_BY_PRODUCTS
    values = _FLOAT * N * (2 * G if is_copied else H + 2 * G) * Dh
    mixed = _FLOAT * N * H * Dh * (2 if keeps_documents_apart else 1)  # one product for all queries copies them
    attention = rotated + values + mixed + _probabilities(n_sequences, H, seq_len, keeps_documents_apart)
    dense = _FLOAT * N * 3 * model.d_ff  # gate and up, and their product
    layer = 2 * norm + attention + (dense if model.is_dense else _experts_kept(model, N))
    angles = _FLOAT * Dh * (N if keeps_documents_apart else seq_len)
    ends = _FLOAT * (N * D + N) + _LONG * N + angles  # final norm, token ids, rotary angles
    loss = _FLOAT * (N * D + (model.vocab_size or 1) * D)  # its gradients are made in the forward pass
    return KeptActivations(layer, ends + loss)


def _probabilities(n_sequences: int, n_heads: int, seq_len: int, keeps_documents_apart: bool) -> int:
    """Return what attention keeps of its scores."""
    if seq_len > LONGEST_BY_PRODUCTS:
        return _FLOAT * n_sequences * n_heads * seq_len  # the softmax's normaliser
    if keeps_documents_apart:
        return _FLOAT * n_sequences * n_heads * seq_len**2
    blocks = range(0, seq_len, QUERY_BLOCK)
    pairs = sum((min(b + QUERY_BLOCK, seq_len) - b) * min(b + QUERY_BLOCK, seq_len) for b in blocks)
    return _FLOAT * n_sequences * n_heads * pairs


def _experts_kept(model: ModelConfig, tokens: int) -> int:
    rows, E, K = _rows(model, tokens), model.n_experts, model.top_k
    # in, out, gate and up; whose they are
    experts = _FLOAT * rows * (2 * model.d_model + 2 * model.d_ff) + _LONG * rows
    # logits, their copy for the z loss of all layers, probabilities, their order, log-partition; weights and rows of
    # the assignments; shares of the experts
    chosen = K if K <= E // 4 else E  # ``ops.cpu.largest_indices`` keeps the order of all
    router = tokens * (3 * _FLOAT * E + _LONG * chosen + _FLOAT + _FLOAT * K + _LONG * K) + _FLOAT * E
    return experts + router


def _rows(model: ModelConfig, tokens: int) -> int:
    """Return the rows of the dispatched buffer, as ``dispatch.plan_dispatch`` makes it."""
    assignments = tokens * model.top_k
    alignment = segment_alignment(assignments, model.n_experts, _CPU, torch.float32)
    return count_rows(assignments, model.n_experts, alignment)


def _transient_bytes(model: ModelConfig, tokens: int) -> int:
    """Return the buffers of the feed-forward networks' backward pass: gradients of rows, and four of width d_ff."""
    rows = tokens if model.is_dense else _rows(model, tokens)
    return _FLOAT * rows * (2 * model.d_model + 4 * model.d_ff // model.n_experts)  # d_ff: one expert at a time


def _kept_when_recomputed(model: ModelConfig, tokens: int) -> int:
    """Return what activation checkpointing keeps: each layer's input, and what it sorted."""
    sorted_ = 0 if model.is_dense else (_FLOAT + _LONG) * model.n_experts + 2 * _LONG * model.top_k
    return tokens * (_FLOAT * model.d_model + sorted_)
