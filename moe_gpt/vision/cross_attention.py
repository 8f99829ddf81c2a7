"""Gated cross-attention between the blocks of a finished decoder: text sees pictures, and text alone stays as it was.

Flamingo (arXiv 2204.14198, section 2.2) puts layers between frozen blocks, as does Mllama, the text model of Llama 3.2.
As in Mllama, each layer is x + tanh(g) * attention(norm(x)), then x + tanh(h) * feed_forward(norm(x)), with g and h
from 0. Unlike there, **a token that sees no picture skips both halves**, so its numbers stay bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.config import ModelConfig
from moe_gpt.model.experts import FeedForward
from moe_gpt.model.norm import RMSNorm
from moe_gpt.model.transformer import MoEGPT


class Seen(NamedTuple):
    """The pictures of a batch, and which of them each token sees."""

    features: Float[Tensor, "B S Dv"]
    """Rows of the encoder, of all pictures of a sequence one after another."""
    picture: Int[Tensor, "B S"]
    """Number of the picture that a row belongs to, from 1; 0 for padding."""
    sees: Int[Tensor, "B T"]
    """Number of the picture that a token sees; 0 for none."""

    @property
    def visible(self) -> Bool[Tensor, "B 1 T S"]:
        """Whether a token sees a row."""
        return ((self.sees[..., None] == self.picture[:, None]) & (self.sees[..., None] > 0))[:, None]


def last_seen(is_picture: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the number of the last picture at or before each token, from 1; 0 before the first.

    Args:
        is_picture: the k-th token of a row where it is True stands for the row's k-th picture.
    """
    return is_picture.cumsum(dim=1)


Attend = Callable[[Float[Tensor, "B H T Dh"]], Float[Tensor, "B H T Dh"]]
"""Returns what queries take from pictures."""


class CrossAttention(nn.Module):
    """Attention from text to rows of pictures, with shared key-value heads and normalised queries and keys.

    Args:
        config: of the text model, whose heads it has.
        features: width of a row.
    """

    def __init__(self, config: ModelConfig, features: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = ops.Linear(config.d_model, config.n_heads * config.head_dim)
        self.kv = ops.Linear(features, 2 * config.n_kv_heads * config.head_dim)
        self.out = ops.Linear(config.n_heads * config.head_dim, config.d_model)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))

    def init_weights(self, std: float, residual_std: float) -> None:
        """Draw weights: normal with ``std``, the projection into the residual stream with ``residual_std``."""
        for linear, deviation in ((self.q, std), (self.kv, std), (self.out, residual_std)):
            nn.init.normal_(linear.weight, std=deviation)

    def keys_and_values(self, features: Float[Tensor, "B S Dv"]) -> tuple[Tensor, Tensor]:
        """Return keys and values of pictures, each (B, G, S, Dh); decoding computes them once."""
        keys, values = rearrange(self.kv(features), "B S (two G Dh) -> two B G S Dh", two=2, Dh=self.head_dim)
        return self.k_norm(keys), values

    def queries(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T Dh"]:
        """Return the queries of tokens."""
        return self.q_norm(rearrange(self.q(x), "B T (H Dh) -> B H T Dh", Dh=self.head_dim))

    def weights(self, x: Float[Tensor, "B T D"], seen: Seen) -> Float[Tensor, "B H T S"]:
        """Return how much each token looks at each row, by head; zero where a token sees none."""
        return self._weights(self.queries(x), self.keys_and_values(seen.features)[0], seen)

    def _weights(self, queries: Tensor, keys: Tensor, seen: Seen) -> Tensor:
        shared = rearrange(queries, "B (G n) T Dh -> B G (n T) Dh", G=keys.shape[1]) @ keys.mT
        scores = rearrange(shared, "B G (n T) S -> B (G n) T S", T=queries.shape[2]) * self.head_dim**-0.5
        # -inf would give NaN where a token sees nothing
        scores = scores.masked_fill(~seen.visible, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) * (seen.sees > 0)[:, None, :, None]

    def attend(self, queries: Float[Tensor, "B H T Dh"], seen: Seen) -> Float[Tensor, "B H T Dh"]:
        """Return what queries take from the pictures of a batch; zero where a token sees none."""
        keys, values = self.keys_and_values(seen.features)
        if queries.device.type == "cpu":  # torch's fused attention takes five times as long with this precision
            weights = rearrange(self._weights(queries, keys, seen), "B (G n) T S -> B G (n T) S", G=keys.shape[1])
            mixed = weights.to(values.dtype) @ values
            return rearrange(mixed, "B G (n T) Dh -> B (G n) T Dh", T=queries.shape[2])
        return self._fused(queries, keys, values, seen)

    def _fused(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Seen) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen.visible, enable_gqa=True)

    def forward(self, x: Float[Tensor, "B T D"], attend: Attend) -> Float[Tensor, "B T D"]:
        """Return what the tokens take from the pictures, by ``self.attend`` or by keys that were kept."""
        return self.out(rearrange(attend(self.queries(x)), "B H T Dh -> B T (H Dh)"))


class GatedCrossBlock(nn.Module):
    """x + tanh(gate) * attention(norm(x)), then the same with a feed-forward network, for tokens that see a picture.

    Args:
        config: of the text model.
        features: width of the encoder's rows.
    """

    def __init__(self, config: ModelConfig, features: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = (RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.attention, self.feed_forward = CrossAttention(config, features), FeedForward(config)
        self.attention_gate, self.feed_forward_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Float[Tensor, "B T D"], seen: Seen) -> Float[Tensor, "B T D"]:
        """Return the residual stream after the pictures."""
        new = self.after(x, functools.partial(self.attention.attend, seen=seen))
        return torch.where((seen.sees > 0)[..., None], new, x)

    def after(self, x: Float[Tensor, "B T D"], attend: Attend) -> Float[Tensor, "B T D"]:
        """Return the residual stream of tokens that all see a picture."""
        new = x + self.attention_gate.tanh() * self.attention(self.attention_norm(x), attend)
        return new + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(new))[0]


class CrossLayers(nn.Module):
    """Cross-attention before blocks of a decoder, which is not changed: hooks call it while ``looking``.

    Args:
        model: the text model.
        features: width of the encoder's rows.
        every: a layer before block 0, ``every``, 2 · ``every`` and so on.
    """

    def __init__(self, model: MoEGPT, features: int, every: int = 1) -> None:
        super().__init__()
        std = model.config.init_std
        self.every = every
        self.layers = nn.ModuleList(GatedCrossBlock(model.config, features) for _ in model.blocks[::every])
        for module in self.layers.modules():
            if init_weights := getattr(module, "init_weights", None):
                init_weights(std, std / (2 * model.config.n_layers) ** 0.5)

    @contextlib.contextmanager
    def looking(self, model: MoEGPT, seen: Seen | None) -> Iterator[None]:
        """Let a decoder see pictures within the block; None is text alone, for which nothing is computed."""
        with contextlib.ExitStack() as stack:
            for block, layer in zip(model.blocks[:: self.every], self.layers, strict=True) if seen else ():

                def look(_: nn.Module, arguments: tuple[Tensor, ...], layer: nn.Module = layer) -> tuple[Tensor, ...]:
                    return (layer(arguments[0], seen), *arguments[1:])

                handle = block.register_forward_pre_hook(look)
                stack.callback(handle.remove)
            yield
