"""Sparse upcycling: a dense model's weights as the start of a mixture of experts (arXiv 2212.05055, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe_gpt.config import ModelConfig

_DENSE_NAMES = {"gate_up.weight": "experts.gate_up", "down.weight": "experts.down"}


def upcycle(dense: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a mixture in which every expert is the dense model's feed-forward network.

    If the weights of a token's experts sum to 1, the mixture starts as the same function as the dense model: all
    experts are equal, whatever the router chooses. Training makes them differ, because each sees other tokens. The
    router's tensors are not returned, because a dense model has none.

    Args:
        dense: the dense model's tensors by our names.
        config: of the mixture.
    """
    mixture = {}
    for name, tensor in dense.items():
        block, is_feed_forward, rest = name.partition(".feed_forward.")
        if is_feed_forward:
            name = f"{block}.feed_forward.{_DENSE_NAMES[rest]}"
            tensor = tensor.expand(config.n_experts, *tensor.shape)  # a view: no memory
        mixture[name] = tensor
    return mixture


def starts_as_same_function(config: ModelConfig) -> bool:
    """Whether the weights of a token's experts always sum to 1, so that equal experts act as one."""
    return config.normalize_topk or config.top_k == config.n_experts
