"""Causal self-attention with shared key-value heads and rotary positions.

One key-value head is multi-query attention (Shazeer 2019, arXiv 1911.02150), several are grouped-query attention
(arXiv 2305.13245), as many as query heads are the multi-head attention of the original transformer. The same code
serves all three. Rotary positions (arXiv 2104.09864) use the half-split layout of Llama and Mixtral.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_gpt.config import ModelConfig
from moe_gpt.model.documents import DocumentBlocks, DocumentMask, DocumentSpans, attend_in_blocks, attend_one_by_one
from moe_gpt.model.paths import attends_by_products, by_hand, takes_gradients_by_hand

QUERY_BLOCK = 64
"""Queries at a time in ``attend_in_query_blocks``."""


def rotary_angles(
    positions: Int[Tensor, "B T"], head_dim: int, rope_theta: float
) -> tuple[Float[Tensor, "B T 1 {head_dim}//2"], Float[Tensor, "B T 1 {head_dim}//2"]]:
    """Return cosine and sine of each position's rotation angles in float32 (RoFormer, eq. 15)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * rope_theta**-exponents
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotate(x: Float[Tensor, "B T heads Dh"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T heads Dh"]:
    """Rotate each pair (x[i], x[i + Dh/2]) by its position's angle, in float32; the result has x's type."""
    if takes_gradients_by_hand(x):
        return by_hand(_Rotate, x, cos, sin)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The rotation with both halves written into one buffer. Its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    result = x.new_empty(x.shape, dtype=torch.float32)
    new_first, new_second = result.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    return result.to(x.dtype)


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
        """Store (B, G, T, Dh) of new positions; return all positions of the layer, (B, G, S, Dh).

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


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "T S"]:
    """Return which keys each query may see, where the queries are the last ``n_queries`` of ``n_keys`` positions."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def attend(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G S Dh"],
    values: Float[Tensor, "B G S Dh"],
    mask: Bool[Tensor, "#B 1 T S"] | DocumentMask | None,
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v; a mask of None is causal, where the queries are the last positions.

    ``paths.attends_by_products`` decides between PyTorch's scaled_dot_product_attention and plain products.
    """
    if isinstance(mask, DocumentBlocks):
        return attend_in_blocks(queries, keys, values, mask)
    if isinstance(mask, DocumentSpans):
        return attend_one_by_one(queries, keys, values, mask)
    if mask is None and queries.shape[2] == 1:  # it sees everything, so the heads that share keys can be its rows
        rows = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[3])
        return F.scaled_dot_product_attention(rows, keys, values).reshape(queries.shape)
    if attends_by_products(queries, keys.shape[2]):
        if mask is None and queries.shape[2] == keys.shape[2] and takes_gradients_by_hand(queries):
            return attend_in_query_blocks(queries, keys, values)
        return attend_by_products(queries, keys, values, mask)
    is_grouped = keys.shape[1] < queries.shape[1]
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
    )


def attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the same with the query heads of each key-value head folded into the rows of one matrix product."""
    B, H, T, Dh = queries.shape
    G, S = keys.shape[1:3]
    visible = causal_mask(T, S, queries.device)[None, None] if mask is None else mask
    bias = queries.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
    bias = bias.unsqueeze(2).expand(-1, G, H // G, T, S)
    if bias.shape[0] == 1:  # one mask for all: one matrix, shared by the whole batch
        bias = bias[0, 0].reshape(1, H // G * T, S).expand(B * G, -1, -1)
    else:
        bias = bias.reshape(B * G, H // G * T, S)
    folded = queries.reshape(B * G, H // G * T, Dh)
    scores = torch.baddbmm(bias, folded, keys.reshape(B * G, S, Dh).transpose(1, 2), alpha=Dh**-0.5)
    probs = scores.float().softmax(dim=-1).to(values.dtype)
    return torch.bmm(probs, values.reshape(B * G, S, Dh)).view(B, H, T, Dh)


def attend_in_query_blocks(
    queries: Float[Tensor, "B H T Dh"], keys: Float[Tensor, "B G T Dh"], values: Float[Tensor, "B G T Dh"]
) -> Float[Tensor, "B H T Dh"]:
    """Compute causal attention by such products, for ``QUERY_BLOCK`` queries at a time and the keys up to them.

    That skips nearly half of the work, and half of the memory for the probabilities.
    """
    return by_hand(_QueryBlocks, queries, keys, values)


class _QueryBlocks(torch.autograd.Function):
    """Autograd by itself would add up a full-size gradient of the keys for every block."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        (B, H, T, Dh), G = queries.shape, keys.shape[1]
        keys, values = (x.reshape(B * G, T, Dh) for x in (keys, values))
        # position-major in memory, as the caller's next projection reads it
        mixed = queries.new_empty(B, T, H, Dh).transpose(1, 2)
        future = queries.new_full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu_(1)
        softmax_type = torch.promote_types(queries.dtype, torch.float32)
        probs = []
        for start, end in _blocks(T):
            n = end - start
            block = _fold(queries[:, :, start:end] * Dh**-0.5, G)
            scores = torch.bmm(block, keys[:, :end].transpose(1, 2))
            scores.view(B, H, n, end)[..., start:] += future[:n, :n]
            probs.append(scores.softmax(-1, dtype=softmax_type).to(values.dtype))
            mixed[:, :, start:end] = torch.bmm(probs[-1], values[:, :end]).view(B, H, n, Dh)
        ctx.save_for_backward(queries, keys, values, *probs)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, *probs = ctx.saved_tensors
        B, H, T, Dh = queries.shape
        G = len(keys) // B
        grad_queries = queries.new_empty(B, T, H, Dh).transpose(1, 2)
        grad_keys, grad_values = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (keys, values)
        )
        for (start, end), p in zip(_blocks(T), probs, strict=True):
            upstream = _fold(grad[:, :, start:end], G)
            grad_values[:, :end] += torch.bmm(p.transpose(1, 2), upstream)
            grad_probs = torch.bmm(upstream, values[:, :end].transpose(1, 2))
            # softmax's gradient, p · (g - Σ p g)
            grad_scores = torch._softmax_backward_data(grad_probs, p, -1, p.dtype)
            grad_block = torch.bmm(grad_scores, keys[:, :end]).view(B, H, end - start, Dh)
            torch.mul(grad_block, Dh**-0.5, out=grad_queries[:, :, start:end])
            grad_keys[:, :end] += torch.bmm(grad_scores.transpose(1, 2), _fold(queries[:, :, start:end], G))
        grad_keys *= Dh**-0.5
        return grad_queries, *(x.to(keys.dtype).view(B, G, T, Dh) for x in (grad_keys, grad_values))


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _fold(x: Tensor, n_kv_heads: int) -> Tensor:
    """Return (B, H, n, Dh) as (B·G, H/G·n, Dh): the heads that share a key-value head are rows of one matrix."""
    B, _, _, Dh = x.shape
    return x.reshape(B * n_kv_heads, -1, Dh)


class Attention(nn.Module):
    """Multi-query, grouped-query or multi-head attention, by ``n_kv_heads``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.n_heads * self.head_dim, config.d_model, bias=False)

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        nn.init.normal_(self.qkv.weight, std=std)
        nn.init.normal_(self.out.weight, std=residual_std)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotary: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "#B 1 T S"] | DocumentMask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Let every position read from itself and the positions before it.

        Args:
            x: normalised residual stream.
            rotary: cosine and sine from ``rotary_angles`` for the positions of x.
            mask: which keys each query may see; None is causal among the positions of x, which is right wherever
                there is no cache and no padding.
            cache: where keys and values of earlier positions are, and where those of x are written.
            layer: the layer's place in the cache.
        """
        heads = rearrange(self.qkv(x), "B T (heads Dh) -> B T heads Dh", Dh=self.head_dim)
        rotating, values = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        queries, keys = rotate(rotating, *rotary).split([self.n_heads, self.n_kv_heads], dim=2)
        queries, keys, values = (rearrange(h, "B T heads Dh -> B heads T Dh") for h in (queries, keys, values))
        if cache is not None:
            keys, values = cache.write(layer, keys, values)
        mixed = attend(queries, keys, values, mask)
        return self.out(rearrange(mixed, "B heads T Dh -> B T (heads Dh)"))
