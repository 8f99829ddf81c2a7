"""Keys and values of the positions that were seen, so that decoding computes each of them once."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_gpt import ops
from moe_gpt.config import ModelConfig


class KVCache:
    """Keys and values of the positions seen so far, and the angles of all positions, in buffers that never grow."""

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        capacity = min(capacity, config.max_seq_len)
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        positions = torch.arange(capacity, device=device)[None]
        self.cos, self.sin = ops.rotary_angles(positions, config.head_dim, config.rope_theta)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys.shape[3]

    def visible(self, n_tokens: int, valid_mask: Bool[Tensor, "B S"] | None = None) -> ops.Visible:
        """Return what new tokens may see; raise ``ValueError`` where the cache has no room for them."""
        if (end := self.length + n_tokens) > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} positions, got {end}")
        return ops.Visible(self.length, valid_mask)

    def rotary(self, positions: Int[Tensor, "#B T"]) -> tuple[Tensor, Tensor]:
        """Return ``ops.rotary_angles`` of positions, each always the same bits."""
        return self.cos[0, positions], self.sin[0, positions]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new positions (B, G, T, Dh); return those of the whole layer (B, G, S, Dh).

        ``length`` does not move before ``advance``.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        """Count the new positions. The model calls it after its last layer: each layer writes at the same positions."""
        self.length += n_tokens


def place_tokens(
    tokens: Tensor, config: ModelConfig, valid_mask: Tensor | None, cache: KVCache | None, document_ids: Tensor | None
) -> tuple[ops.Visible, tuple[Tensor, Tensor]]:
    """Return what each token may see, and the angles of its position. ``MoEGPT.forward`` explains the arguments."""
    T, device = tokens.shape[1], tokens.device
    if document_ids is not None and (valid_mask is not None or cache is not None):
        raise ValueError("document_ids are for whole sequences without padding and without a cache")
    if cache is not None:
        visible = ops.prepare(cache.visible(T, valid_mask), T, device)
        return visible, cache.rotary(visible.positions(T, device))
    if config.max_seq_len < T:
        raise ValueError(f"a sequence may have at most max_seq_len={config.max_seq_len} tokens, got {T}")
    visible = ops.prepare(ops.Visible(0, valid_mask, document_ids), T, device)
    return visible, ops.rotary_angles(visible.positions(T, device), config.head_dim, config.rope_theta)
