"""The decoder: pre-norm blocks of attention and mixture-of-experts layers between an embedding and a projection.

With several experts, the architecture is Mixtral's (arXiv 2401.04088); with one, it is Llama's. With
``n_kv_heads: 1``, attention is multi-query, as the GPT-4 reports say. The code is plain PyTorch for one device:
precision, compilation, checkpointing and parallelism are applied from outside.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.config import ModelConfig, scales_of
from moe_gpt.model.attention import Attention
from moe_gpt.model.cache import KVCache, place_tokens
from moe_gpt.model.experts import FeedForward
from moe_gpt.model.losses import CrossEntropy, RouterStats, SumCounts, cross_entropy_from_hidden, router_stats
from moe_gpt.model.moe import MoE
from moe_gpt.model.norm import RMSNorm
from moe_gpt.model.router import MakeRouter, Router, Routing


class ModelOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Float[Tensor, "B T V"]
    """Scores of the next token at every position."""
    router_stats: RouterStats | None
    """Losses and counts stacked over layers; None for a dense model."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, attention: Attention, feed_forward: MoE | FeedForward) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotary: tuple[Tensor, Tensor],
        visible: ops.Visible,
        cache: KVCache | None,
        cache_layer: int,
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """Return the new residual stream and the routing (None if dense). ``Attention`` explains the arguments."""
        x = x + self.attention(self.attention_norm(x), rotary, visible, cache, cache_layer)
        y, routing = self.feed_forward(self.feed_forward_norm(x), visible.valid_queries)
        return x + y, routing


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, and back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class MoEGPT(nn.Module):
    """The decoder.

    Args:
        config: the shape; ``vocab_size`` must be a number here.
        make_router: is called with the config once for each layer, and returns the layer's router.

    Raises:
        ValueError: where ``config.vocab_size`` is None.
    """

    score = staticmethod(cross_entropy_from_hidden)
    """Replaceable: where devices share the vocabulary, each scores its part."""

    def __init__(self, config: ModelConfig, make_router: MakeRouter = Router) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size must be a number to build a model, got None; give the tokenizer's size")
        self.config, self.make_router = config, make_router
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList()
        for layer in range(config.n_layers):
            if layer % config.attention_sharing == 0:  # the other layers use the attention of the layer before them
                attention = Attention(config)
            feed_forward = FeedForward(config) if config.is_dense else MoE(config, make_router)
            self.blocks.append(Block(config, attention, feed_forward))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = ops.Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the initial weights from torch's global generator.

        Each module below, a user's router too, draws its own if it has a method ``init_weights(std, residual_std)``.
        Matrices are normal with ``init_std``, and norms are 1. The two projections into the residual stream of each
        block are divided by sqrt(2 · n_layers), so that the stream's variance does not grow with depth (GPT-2). With
        ``mup_base``, matrices are then scaled as muP says.
        The first logits have the variance d_model · init_std², and the loss starts above ln V by half of it.
        Call it again after materialising a model built on the meta device.
        """
        if self.config.tie_embeddings:  # materialising a meta model unties them
            self.output.weight = self.embedding.weight
        std = self.config.init_std
        nn.init.normal_(self.embedding.weight, std=std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.output.weight, std=std)
        for module in self.modules():
            init_weights: Callable[[float, float], None] | None = getattr(module, "init_weights", None)
            if module is not self and init_weights:
                init_weights(std, std / math.sqrt(2 * self.config.n_layers))
        for name, parameter in self.named_parameters():
            parameter.mul_(scales_of(self.config, name).std)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        valid_mask: Bool[Tensor, "B S"] | None = None,
        cache: KVCache | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> ModelOutput:
        """Score the next token at every position.

        Args:
            tokens: ids. Where a cache is given, they follow the positions in it.
            valid_mask: False for padding, which may be on either side. The mask covers the cached positions too.
                Padding is not attended to, takes no position and is not counted in the routers' statistics.
            cache: keys and values of earlier positions. This call adds those of its tokens.
            document_ids: the number of each position's document, where a sequence holds several documents one after
                another. A position then sees only its own document, and is counted from the document's start.

        Raises:
            ValueError: where the sequence is longer than ``max_seq_len`` or than the cache, or ``document_ids`` come
                with padding or a cache.
        """
        valid_queries = ops.Visible(cache.length if cache else 0, valid_mask).valid_queries  # before the cache grows
        hidden, routings = self.hidden_states(tokens, valid_mask, cache, document_ids)
        return ModelOutput(self.output(hidden), self._stats(routings, valid_queries))

    def next_token_logits(self, tokens: Int[Tensor, "B T"], cache: KVCache) -> Float[Tensor, "B V"]:
        """Return the logits of the last position. No other logits and no statistics are computed."""
        hidden, _ = self.hidden_states(tokens, cache=cache)
        return self.output(hidden[:, -1])

    def cross_entropy(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        document_ids: Int[Tensor, "B T"] | None = None,
        sum_counts: SumCounts | None = None,
        valid_mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[CrossEntropy, RouterStats | None]:
        """Return the summed loss at the targets and the routers' statistics, without the logits of all tokens.

        It equals ``losses.cross_entropy`` of ``forward``'s logits, but needs no memory of tokens times vocabulary.
        ``router_stats`` explains ``sum_counts`` and ``valid_mask``, which is for the statistics alone.
        """
        hidden, routings = self.hidden_states(tokens, document_ids=document_ids)
        ce = self.score(hidden.flatten(0, 1), self.output.weight, targets.flatten())
        return ce, self._stats(routings, valid_mask, sum_counts)

    def routings(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"] | None = None) -> list[Routing]:
        """Return one routing of ``tokens.flatten()`` for each layer, none if dense."""
        return self.hidden_states(tokens, document_ids=document_ids)[1]

    def hidden_states(
        self,
        tokens: Int[Tensor, "B T"],
        valid_mask: Bool[Tensor, "B S"] | None = None,
        cache: KVCache | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], list[Routing]]:
        """Return the last hidden states, which the output matrix turns into logits, and the routings.

        The states are normalised. There is one routing of ``tokens.flatten()`` for each layer, none if dense.
        Arguments and errors are those of ``forward``.
        """
        visible, rotary = place_tokens(tokens, self.config, valid_mask, cache, document_ids)  # once, for all layers
        x, routings = self.embedding(tokens), []
        for layer, block in enumerate(self.blocks):
            x, routing = block(x, rotary, visible, cache, layer)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.final_norm(x), routings

    def moe_layers(self) -> list[MoE]:
        """Return the mixture-of-experts layers in order; none if the model is dense."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def _stats(
        self, routings: list[Routing], valid_mask: Tensor | None = None, sum_counts: SumCounts | None = None
    ) -> RouterStats | None:
        return router_stats(routings, valid_mask, self.config.capacity_ratio if self.training else None, sum_counts)
