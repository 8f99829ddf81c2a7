"""Keys and values of the positions that were seen, so that decoding computes each of them once."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_gpt.config import ModelConfig


class KVCache:
    """Keys and values of the positions seen so far, in buffers that never grow.

    Multi-query attention makes it n_heads times smaller than multi-head attention would.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new positions (B, G, T, Dh); return those of the whole layer (B, G, S, Dh).

        ``length`` does not move: the model advances it once, after its last layer.

        Raises:
            ValueError: where the positions do not fit.
        """
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} positions, got {end}")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
