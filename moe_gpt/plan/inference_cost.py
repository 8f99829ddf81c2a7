"""What generating a token costs: cache, memory, time and money of a cluster that serves a model.

A step of decoding reads the weights that its tokens use and the keys and values of their contexts, and multiplies.
Whichever takes longer at the hardware's full speed is the time of the step: a bound that no software beats (Pope et
al. 2022, arXiv 2211.05102). A batch shares the reading; in a mixture of experts it also touches more experts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.measure.flops import count_flops
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.hardware import Gpu, check_positive

_MOST_DRAFTED = 1000


class Layout(NamedTuple):
    """How one copy of the model is spread: each layer over ``tensor`` GPUs, the layers over ``pipeline`` stages."""

    tensor: int = 8
    pipeline: int = 16

    @property
    def gpus(self) -> int:
        """GPUs of one copy."""
        return self.tensor * self.pipeline

    def check(self, config: ModelConfig, n_gpus: int) -> None:
        """Raise where the model cannot be spread like this over that many GPUs.

        Raises:
            InputError: in one line, naming the argument and what would be right.
        """
        require_count(n_gpus=n_gpus, tensor=self.tensor, pipeline=self.pipeline)
        if n_gpus < self.gpus:
            raise InputError(
                f"n_gpus must be at least tensor x pipeline = {self.tensor} x {self.pipeline} = {self.gpus}, "
                f"got {n_gpus}; use more GPUs or smaller groups"
            )
        if config.n_heads % self.tensor:
            fitting = ", ".join(str(n) for n in range(1, config.n_heads + 1) if config.n_heads % n == 0)
            raise InputError(f"tensor must divide n_heads={config.n_heads}, got {self.tensor}; choose one of {fitting}")
        if self.pipeline > config.n_layers:
            raise InputError(f"pipeline must be at most n_layers={config.n_layers}, got {self.pipeline}")


def kv_cache_bytes_per_token(config: ModelConfig, n_kv_heads: int | None = None, bytes_per_element: float = 2) -> float:
    """Return the bytes that one position's keys and values take: 2 · L · G · Dh · bytes.

    Args:
        config: the shape; layers that share attention weights still have keys of their own.
        n_kv_heads: to see other head counts than the config's: 8 for grouped, n_heads for full attention.
        bytes_per_element: 2 for bfloat16, 1 for 8-bit, 0.5 for 4-bit.
    """
    n_kv_heads = config.n_kv_heads if n_kv_heads is None else n_kv_heads
    require_count(n_kv_heads=n_kv_heads)
    _require_positive(bytes_per_element=bytes_per_element)
    if config.n_heads % n_kv_heads:
        raise InputError(f"n_kv_heads must divide n_heads={config.n_heads}, got {n_kv_heads}")
    return 2 * config.n_layers * n_kv_heads * config.head_dim * bytes_per_element


def weight_bytes_per_gpu(config: ModelConfig, layout: Layout, bytes_per_element: float = 2) -> float:
    """Return the bytes of weights on a GPU of the fullest stage.

    Layers are dealt out as evenly as their number allows: 120 over 16 stages is eight stages of 8 and eight of 7. The
    first stage has the embedding, the last the output matrix, and they are among the stages with fewer layers where
    there are any. Routers, norms and a key-value head that several GPUs use count as divided by ``tensor`` although
    each GPU has them whole: under 0.2 % for the reported shape.
    """
    _require_positive(bytes_per_element=bytes_per_element)
    layout.check(config, layout.gpus)
    counts = count_parameters(config)
    layer = (counts.total - counts.embedding) / config.n_layers
    fewest, more = divmod(config.n_layers, layout.pipeline)
    matrix = (config.vocab_size or 1) * config.d_model
    at_the_ends = counts.embedding if layout.pipeline == 1 else matrix
    end_is_full = 0 < more == layout.pipeline - 1
    with_matrix = (fewest + end_is_full) * layer + at_the_ends
    return max(with_matrix, math.ceil(config.n_layers / layout.pipeline) * layer) * bytes_per_element / layout.tensor


def cache_share(n_kv_heads: int, n_sequences: int, tensor: int) -> float:
    """Return the part of a layer's cache that lies on the fullest of the ``tensor`` GPUs that share the layer.

    A head of a sequence is not divided, so that 8 GPUs can share one key-value head only between sequences (the
    batch-sharded multi-query attention of arXiv 2211.05102, section 3.3): 1 for one sequence, 1/8 for 8.
    """
    require_count(n_kv_heads=n_kv_heads, n_sequences=n_sequences, tensor=tensor)
    return math.ceil(n_kv_heads * n_sequences / tensor) / (n_kv_heads * n_sequences)


def expected_experts_touched(n_experts: int, top_k: int, n_tokens: int) -> float:
    """Return E · (1 - (1 - K/E)^B): the experts of a layer that at least one of B tokens is sent to, on average.

    Exact where each token's K different experts are uniform and tokens independent. Real tokens of one text agree
    with each other and touch fewer.
    """
    _check_choice(n_experts, top_k, n_tokens)
    return n_experts * (1 - (1 - top_k / n_experts) ** n_tokens)


def experts_touched_distribution(n_experts: int, top_k: int, n_tokens: int) -> tuple[Fraction, ...]:
    """Return the exact probability that 0, 1, ..., n_experts experts of a layer are touched, under the same choice.

    By inclusion and exclusion, P(m) = C(E, m) · sum over j of (-1)^j · C(m, j) · (C(m-j, K) / C(E, K))^B. The
    probabilities sum to 1 and their mean is ``expected_experts_touched``. For batches of thousands, the fractions
    have thousands of digits.
    """
    _check_choice(n_experts, top_k, n_tokens)
    outcomes = math.comb(n_experts, top_k) ** n_tokens
    return tuple(
        Fraction(
            math.comb(n_experts, m)
            * sum((-1) ** j * math.comb(m, j) * math.comb(m - j, top_k) ** n_tokens for j in range(m + 1)),
            outcomes,
        )
        for m in range(n_experts + 1)
    )


def tokens_per_expert(n_experts: int, top_k: int, n_tokens: int) -> float:
    """Return the mean number of a batch's tokens that an expert gets: B · K / E."""
    _check_choice(n_experts, top_k, n_tokens)
    return n_tokens * top_k / n_experts


class DecodingStep(NamedTuple):
    """What one step of decoding reads and multiplies, over all GPUs of a copy of the model."""

    weight_bytes: float
    """The weights that its tokens use, each once: everything but the experts that no token is sent to."""
    cache_bytes: float
    """Keys and values of all contexts, times what the fullest GPU has beyond an even share."""
    flops: float

    def reading_seconds(self, gpu: Gpu, tensor: int) -> float:
        """Return the time to read: the stages work one after another, the ``tensor`` GPUs of a stage together."""
        return (self.weight_bytes + self.cache_bytes) / (tensor * gpu.bandwidth)

    def multiplying_seconds(self, gpu: Gpu, tensor: int) -> float:
        """Return the time to multiply at the GPUs' bf16 speed."""
        return self.flops / (tensor * gpu.bf16_flops)

    def seconds(self, gpu: Gpu, tensor: int) -> float:
        """Return the longer of the two."""
        return max(self.reading_seconds(gpu, tensor), self.multiplying_seconds(gpu, tensor))


def decoding_step(
    config: ModelConfig,
    n_sequences: int,
    context: int,
    tensor: int,
    *,
    tokens_each: int = 1,
    bytes_per_element: float = 2,
) -> DecodingStep:
    """Return what a step of decoding costs.

    Args:
        config: the shape.
        n_sequences: decoded together.
        context: positions that each new token sees, in every sequence.
        tensor: GPUs that share a layer.
        tokens_each: tokens of a sequence in the step: 1, or gamma + 1 where speculative decoding verifies gamma.
        bytes_per_element: of weights and cache.
    """
    require_count(n_sequences=n_sequences, context=context, tensor=tensor, tokens_each=tokens_each)
    _require_positive(bytes_per_element=bytes_per_element)
    sizes, n_tokens = _sizes(config), n_sequences * tokens_each
    touched = expected_experts_touched(config.n_experts, config.top_k, n_tokens)
    cache_bytes = n_sequences * context * kv_cache_bytes_per_token(config, bytes_per_element=bytes_per_element)
    unevenness = cache_share(config.n_kv_heads, n_sequences, tensor) * tensor
    return DecodingStep(
        weight_bytes=(sizes.shared + touched * sizes.expert) * bytes_per_element,
        cache_bytes=cache_bytes * unevenness,
        flops=n_tokens * (sizes.flops + context * sizes.flops_per_position),
    )


class _Sizes(NamedTuple):
    shared: int
    """Parameters that every step reads: attention, norms, routers, the output matrix."""
    expert: int
    """Parameters of one expert in every layer."""
    flops: int
    """Of one token, its attention scores left out."""
    flops_per_position: int


@cache
def _sizes(config: ModelConfig) -> _Sizes:
    counts, flops = count_parameters(config), count_flops(config, 1)
    shared = counts.total - config.n_experts * counts.per_expert - counts.embedding
    shared += (config.attention_sharing - 1) * counts.attention + (config.vocab_size or 1) * config.d_model
    scores = flops.attention_scores
    return _Sizes(shared, counts.per_expert, flops.forward - scores, scores)


def compute_bound_batch(
    config: ModelConfig, gpu: Gpu, context: int | None = None, bytes_per_element: float = 2
) -> float:
    """Return the least batch at which multiplying takes as long as reading; infinite where none does.

    Without a context, the weights alone are read: weights' bytes / bandwidth = FLOPs / FLOP/s. With one, each
    sequence adds its cache to the reading and its attention scores to the FLOPs, both divided evenly over the GPUs;
    from some length on, reading a cache takes longer than its token's products and no batch helps.
    """
    _require_positive(bytes_per_element=bytes_per_element)
    if context is not None:
        require_count(context=context)
    sizes = _sizes(config)
    per_token = (sizes.flops + (context or 0) * sizes.flops_per_position) / gpu.bf16_flops
    cache_bytes = (context or 0) * kv_cache_bytes_per_token(config, bytes_per_element=bytes_per_element)
    per_token -= cache_bytes / gpu.bandwidth

    def is_compute_bound(batch: int) -> bool:
        read = sizes.shared + expected_experts_touched(config.n_experts, config.top_k, batch) * sizes.expert
        return batch * per_token >= read * bytes_per_element / gpu.bandwidth

    if per_token <= 0:
        return math.inf
    enough = 1
    while not is_compute_bound(enough):
        enough *= 2
    low = enough // 2  # compute-bound at ``enough``, not at ``low``: the weights read per token fall with the batch
    while enough - low > 1:
        middle = (low + enough) // 2
        low, enough = (low, middle) if is_compute_bound(middle) else (middle, enough)
    return enough


def expected_tokens_per_step(acceptance: float, gamma: int) -> float:
    """Return (1 - α^(γ+1)) / (1 - α): tokens that a verification of γ drafted ones yields (arXiv 2211.17192, eq. 1).

    Between 1 (nothing drafted or nothing accepted) and γ + 1 (everything accepted), where each drafted token is
    accepted with probability α, independently of the others.
    """
    _check_speculation(acceptance, gamma)
    return math.fsum(acceptance**i for i in range(gamma + 1))


def speculative_speedup(acceptance: float, draft_cost: float, gamma: int) -> float:
    """Return (1 - α^(γ+1)) / ((1 - α)(γ c + 1)): improvement in walltime (arXiv 2211.17192, theorem 3.8).

    Args:
        acceptance: α.
        draft_cost: c, a step of the draft model over a step of the model.
        gamma: γ, tokens drafted at a time. Verifying them is taken to last as long as decoding one token.
    """
    _require_not_negative(draft_cost=draft_cost)
    return expected_tokens_per_step(acceptance, gamma) / (gamma * draft_cost + 1)


def best_gamma(acceptance: float, draft_cost: float, max_gamma: int = 64) -> int:
    """Return the γ up to ``max_gamma`` with the highest ``speculative_speedup``, the least of equals.

    0 where acceptance <= draft_cost: drafting then never pays (arXiv 2211.17192, corollary 3.9). With acceptance 1,
    or a draft that is free, more is always better and the answer is ``max_gamma``.
    """
    _check_speculation(acceptance, max_gamma)
    return max(range(max_gamma + 1), key=lambda gamma: (speculative_speedup(acceptance, draft_cost, gamma), -gamma))


def speculative_speedup_on(
    config: ModelConfig,
    gpu: Gpu,
    n_sequences: int,
    context: int,
    tensor: int,
    *,
    acceptance: float,
    draft_cost: float,
    gamma: int,
) -> float:
    """Return the improvement in walltime where verifying costs what it costs.

    The γ + 1 tokens of a verification touch more experts than one token does, and multiply γ + 1 times as much; the
    paper's formula counts neither. Below 1 where the batch is compute-bound already.
    """
    tokens = expected_tokens_per_step(acceptance, gamma)
    _require_not_negative(draft_cost=draft_cost)
    plain = decoding_step(config, n_sequences, context, tensor).seconds(gpu, tensor)
    verifying = decoding_step(config, n_sequences, context, tensor, tokens_each=gamma + 1).seconds(gpu, tensor)
    return tokens * plain / (verifying + gamma * draft_cost * plain)


def cost_per_thousand_tokens(price_per_gpu_hour: float, n_gpus: int, tokens_per_second: float) -> float:
    """Return dollars per thousand generated tokens: 1000 · price · GPUs / (3600 · tokens/s)."""
    _require_positive(price_per_gpu_hour=price_per_gpu_hour)
    require_count(n_gpus=n_gpus)
    _require_positive(tokens_per_second=tokens_per_second)
    return 1000 * price_per_gpu_hour * n_gpus / (3600 * tokens_per_second)


def _check_choice(n_experts: int, top_k: int, n_tokens: int) -> None:
    require_count(n_experts=n_experts, top_k=top_k)
    _require_not_negative(n_tokens=n_tokens)
    if top_k > n_experts:
        raise InputError(f"top_k must be at most n_experts={n_experts}, got {top_k}")


def _check_speculation(acceptance: float, gamma: int) -> None:
    if not 0 <= acceptance <= 1:
        raise InputError(f"acceptance must be a probability from 0 to 1, got {acceptance}")
    if not 0 <= gamma <= _MOST_DRAFTED or gamma != int(gamma):
        raise InputError(f"gamma must be a whole number from 0 to {_MOST_DRAFTED}, got {gamma}")


def require_count(**values: int) -> None:
    """Raise an ``InputError`` that names the first value which is not a whole number of at least 1."""
    for name, value in values.items():
        if not (1 <= value < math.inf and value == int(value)):
            raise InputError(f"{name} must be a whole number of at least 1, got {value}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        check_positive(name, value)


def _require_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be a number of at least 0, got {value}")
