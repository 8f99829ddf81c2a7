"""The shape of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from moe_gpt.config.mup import MupBase
from moe_gpt.config.section import Count, Flag, NonNegative, Positive, Problem, Section, divides, unless

_MOST_NUMBERS = 2**60
"""In a tensor, so that torch can count its bytes."""
Layers = Annotated[Count, Field(le=10_000, title="a whole number from 1 to 10,000")]
"""Each layer takes time to build, however narrow it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The shape of a MoEGPT and how its routers choose."""

    vocab_size: Count | None = None
    """Rows of the embedding; null means the tokenizer's number of tokens. More rows are allowed, fewer are not."""
    n_layers: Layers = 4
    """Transformer blocks."""
    d_model: Count = 128
    """Width of the residual stream."""
    n_heads: Count = 4
    """Query heads."""
    n_kv_heads: Count = 1
    """Key-value heads that the query heads share: 1 is multi-query, n_heads is full multi-head attention."""
    head_dim: Count = 32
    """Width of one head (even); n_heads x head_dim need not equal d_model."""
    d_ff: Count = 256
    """Hidden width of one expert (SwiGLU: three matrices of d_model x d_ff)."""
    n_experts: Count = 16
    """Experts per layer; 1 makes the feed-forward dense, without a router."""
    top_k: Count = 2
    """Experts that each token is sent to."""
    normalize_topk: Flag = True
    """Rescale the chosen experts' weights to sum to 1, as Mixtral does; must be false for top_k=1 in a mixture."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """Method that evens out expert loads: the Switch loss, the loss-free bias of arXiv 2408.15664, or none."""
    bias_update_rate: Positive = 1e-3
    """Change of the balancing bias in each optimizer step, with balance: bias (u in the paper, 1e-3)."""
    router_noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise on the router logits, in training only."""
    capacity_factor: Positive | None = None
    """In training, assignments beyond this multiple of an expert's even share get weight 0; null drops none."""
    attention_sharing: Count = 1
    """Consecutive layers that use one set of attention weights; must divide n_layers."""
    tie_embeddings: Flag = False
    """Use the embedding matrix as the output matrix too."""
    max_seq_len: Count = 256
    """Longest context in tokens, for training and generation."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights; projections into the residual use init_std / sqrt(2 n_layers)."""
    mup_base: MupBase | None = None
    """The shape for which the learning rate was tuned: muP carries it over to this shape. null scales nothing."""

    def problems(self) -> Iterator[Problem]:
        """Yield impossible shapes."""
        yield from divides(self, "n_kv_heads", "n_heads")
        yield from divides(self, "attention_sharing", "n_layers")
        text = f"head_dim must be even for rotary positions, got {self.head_dim}; use {self.head_dim + 1}"
        yield from unless(self.head_dim % 2 == 0, text, "head_dim")
        text = f"top_k cannot exceed n_experts={self.n_experts}, got top_k={self.top_k}; lower top_k or raise n_experts"
        yield from unless(self.top_k <= self.n_experts, text, "top_k", "n_experts")
        text = "tie_embeddings must be false with mup_base: one matrix cannot have the scales of embedding and output"
        yield from unless(not (self.tie_embeddings and self.mup_base), text, "tie_embeddings", "mup_base")
        text = (
            f"normalize_topk must be false for top_k=1 of n_experts={self.n_experts}, got true: a single weight "
            "rescaled to 1 gives the router no gradient"
        )
        fits = self.is_dense or self.top_k > 1 or not self.normalize_topk
        yield from unless(fits, text, "normalize_topk", "top_k", "n_experts")
        rows = max(self.vocab_size or 1, 3 * self.n_heads * self.head_dim, 2 * self.n_experts * self.d_ff)
        text = (
            f"d_model must give tensors of at most 2^60 numbers, got {self.d_model} for {rows} rows; lower these sizes"
        )
        yield from unless(self.d_model * rows <= _MOST_NUMBERS, text, "d_model", "d_ff", "n_experts", "vocab_size")

    @property
    def capacity_ratio(self) -> tuple[int, int] | None:
        """Numerator and denominator of capacity_factor / n_experts; None if no token is dropped.

        An expert has slots for this share of the assignments, rounded up. The ratio is exact, because floats would make
        1.1 times 10 slightly more than 11.
        """
        if self.capacity_factor is None:
            return None
        share = Fraction(str(min(self.capacity_factor, self.n_experts))) / self.n_experts  # 1 drops none
        return max(share.limit_denominator(10**9), Fraction(1, 10**9)).as_integer_ratio()  # eight bytes hold products

    @property
    def is_dense(self) -> bool:
        """Whether every block has a single feed-forward network and no router."""
        return self.n_experts == 1
