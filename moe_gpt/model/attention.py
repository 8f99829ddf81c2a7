"""Causal self-attention with shared key-value heads and rotary positions.

One key-value head is multi-query attention (Shazeer 2019, arXiv 1911.02150), several are grouped-query attention
(arXiv 2305.13245), as many as query heads are the multi-head attention of the original transformer. The same code
serves all three. Rotary positions (arXiv 2104.09864) use the half-split layout of Llama and Mixtral.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.config import ModelConfig
from moe_gpt.model.cache import KVCache


class Attention(nn.Module):
    """Causal self-attention: a position attends to itself and to positions before it, as ``visible`` allows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = ops.Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim)
        self.out = ops.Linear(self.n_heads * self.head_dim, config.d_model)

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        nn.init.normal_(self.qkv.weight, std=std)
        nn.init.normal_(self.out.weight, std=residual_std)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotary: tuple[Tensor, Tensor],
        visible: ops.Visible,
        cache: KVCache | None,
        cache_layer: int,
    ) -> Float[Tensor, "B T D"]:
        """Return what attention adds to the residual stream at each position.

        Args:
            x: normalised residual stream.
            rotary: cosine and sine from ``ops.rotary_angles`` for the positions of x.
            visible: which keys each query may see.
            cache: has keys and values of earlier positions; those of x are written into it. None keeps nothing.
            cache_layer: index, in the cache, of the layer that calls; several layers may share this attention.
        """
        qkv = rearrange(self.qkv(x), "B T (heads Dh) -> B T heads Dh", Dh=self.head_dim)
        queries_and_keys, values = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        queries, keys = ops.rotate(queries_and_keys, *rotary).split([self.n_heads, self.n_kv_heads], dim=2)
        queries, keys, values = (rearrange(h, "B T heads Dh -> B heads T Dh") for h in (queries, keys, values))
        if cache is not None:
            keys, values = cache.write(cache_layer, keys, values)
        mixed = ops.attend(queries, keys, values, visible)
        return self.out(rearrange(mixed, "B heads T Dh -> B T (heads Dh)"))
