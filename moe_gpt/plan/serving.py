"""What generating a token costs: cache, memory, time and money of a cluster that serves a model.

A step of decoding reads the weights that its tokens use and the keys and values of their contexts, and multiplies.
Whichever takes longer at the hardware's full speed is the time of the step: a bound that no software beats (Pope et
al. 2022, arXiv 2211.05102). A batch shares the reading; in a mixture of experts it also touches more experts. Weights
and cache are in bfloat16.

In speculative decoding (Leviathan et al., arXiv 2211.17192) a small model drafts gamma tokens and the model verifies
them in one step. The paper takes that step to last as long as decoding one token; ``speculative_speedup_on`` counts
what it costs.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from moe_gpt.config import ModelConfig
from moe_gpt.config.section import Count, CountOrZero, NonNegative, Rate, require
from moe_gpt.errors import InputError
from moe_gpt.measure.flops import count_flops
from moe_gpt.plan.hardware import Gpu, Parallelism
from moe_gpt.plan.options import DraftedTokens, PlanOptions
from moe_gpt.plan.parameters import counts_of
from moe_gpt.plan.quantities import PlanSection, plan_section
from moe_gpt.terminal.numbers import plural

_ELEMENT = 2
"""Bytes of a number."""


def kv_cache_bytes_per_token(config: ModelConfig, n_kv_heads: int | None = None) -> int:
    """Return the bytes that one position's keys and values take: 2 · L · G · Dh · 2.

    Args:
        config: the shape; layers that share attention weights still have keys of their own.
        n_kv_heads: to see other head counts than the config's: 8 for grouped, n_heads for full attention.
    """
    n_kv_heads = config.n_kv_heads if n_kv_heads is None else n_kv_heads
    require(Count, n_kv_heads=n_kv_heads)
    if config.n_heads % n_kv_heads:
        raise InputError(f"n_kv_heads must divide n_heads={config.n_heads}, got {n_kv_heads}")
    return 2 * config.n_layers * n_kv_heads * config.head_dim * _ELEMENT


def weight_bytes_per_gpu(config: ModelConfig, layout: Parallelism) -> float:
    """Return the bytes of weights on a GPU of the fullest stage.

    Layers are dealt out as evenly as their number allows: 120 over 16 stages is eight stages of 8 and eight of 7. The
    first stage has the embedding, the last the output matrix, and they are among the stages with fewer layers where
    there are any. Routers, norms and a key-value head that several GPUs use count as divided by ``tensor`` although
    each GPU has them whole: under 0.2 % for the reported shape.
    """
    counts = counts_of(config)
    layer = (counts.total - counts.embedding) / config.n_layers
    fewest, more = divmod(config.n_layers, layout.pipeline)
    matrix = (config.vocab_size or 1) * config.d_model
    at_the_ends = counts.embedding if layout.pipeline == 1 else matrix
    end_is_full = 0 < more == layout.pipeline - 1
    with_matrix = (fewest + end_is_full) * layer + at_the_ends
    return max(with_matrix, math.ceil(config.n_layers / layout.pipeline) * layer) * _ELEMENT / layout.tensor


def cache_share(n_kv_heads: int, n_sequences: int, tensor: int) -> float:
    """Return the part of a layer's cache that lies on the fullest of the ``tensor`` GPUs that share the layer.

    A head of a sequence is not divided, so that 8 GPUs can share one key-value head only between sequences (the
    batch-sharded multi-query attention of arXiv 2211.05102, section 3.3): 1 for one sequence, 1/8 for 8.
    """
    return math.ceil(n_kv_heads * n_sequences / tensor) / (n_kv_heads * n_sequences)


def expected_experts_touched(n_experts: int, top_k: int, n_tokens: int) -> float:
    """Return E · (1 - (1 - K/E)^B): the experts of a layer that at least one of B tokens is sent to, on average.

    Exact where each token's K different experts are uniform and tokens independent. Real tokens of one text agree
    with each other and touch fewer.
    """
    require(Count, n_experts=n_experts, top_k=top_k)
    require(CountOrZero, n_tokens=n_tokens)
    if top_k > n_experts:
        raise InputError(f"top_k must be at most n_experts={n_experts}, got {top_k}")
    return n_experts * (1 - (1 - top_k / n_experts) ** n_tokens)


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
    config: ModelConfig, n_sequences: int, context: int, tensor: int, *, tokens_each: int = 1
) -> DecodingStep:
    """Return what a step of decoding costs in which each new token sees ``context`` positions.

    A sequence has one token in it (``tokens_each``), or gamma + 1 where speculative decoding verifies gamma.
    """
    require(Count, n_sequences=n_sequences, context=context, tensor=tensor, tokens_each=tokens_each)
    sizes, n_tokens = _sizes(config), n_sequences * tokens_each
    unevenness = cache_share(config.n_kv_heads, n_sequences, tensor) * tensor
    return DecodingStep(
        weight_bytes=sizes.read_by(config, n_tokens),
        cache_bytes=n_sequences * context * kv_cache_bytes_per_token(config) * unevenness,
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

    def read_by(self, config: ModelConfig, n_tokens: int) -> float:
        """Return the bytes of the weights that so many tokens use."""
        touched = expected_experts_touched(config.n_experts, config.top_k, n_tokens)
        return (self.shared + touched * self.expert) * _ELEMENT


@cache
def _sizes(config: ModelConfig) -> _Sizes:
    counts = counts_of(config)
    flops = count_flops(config, 1, counts)
    shared = counts.total - config.n_experts * counts.per_expert - counts.embedding
    shared += (config.attention_sharing - 1) * counts.attention + (config.vocab_size or 1) * config.d_model
    scores = flops.attention_scores
    return _Sizes(shared, counts.per_expert, flops.forward - scores, scores)


def compute_bound_batch(config: ModelConfig, gpu: Gpu, context: int = 0) -> float:
    """Return the least batch at which multiplying takes as long as reading; infinite where none does.

    Without a context, the weights alone are read: weights' bytes / bandwidth = FLOPs / FLOP/s. With one, each
    sequence adds its cache to the reading and its attention scores to the FLOPs, both divided evenly over the GPUs;
    from some length on, reading a cache takes longer than its token's products and no batch helps.
    """
    require(CountOrZero, context=context)
    sizes = _sizes(config)
    per_token = (sizes.flops + context * sizes.flops_per_position) / gpu.bf16_flops
    per_token -= context * kv_cache_bytes_per_token(config) / gpu.bandwidth

    def is_compute_bound(batch: int) -> bool:
        return batch * per_token >= sizes.read_by(config, batch) / gpu.bandwidth

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


def serving_sections(config: ModelConfig, options: PlanOptions, context: int) -> list[PlanSection]:
    """Return the sections ``kv_cache``, ``serving_memory`` and ``serving_speed``; a token sees ``context`` positions.

    Raises:
        InputError: where heads or layers do not go round.
    """
    require(Count, context=context)
    options.serving.check(config, serving=True)
    memory = _memory_section(config, options, context)
    return [_cache_section(config, context), memory, _speed_section(config, options, context, memory["fits"])]


def _cache_section(config: ModelConfig, context: int) -> PlanSection:
    variants = {"this_model": config.n_kv_heads, "grouped": 8, "full": config.n_heads}
    if config.n_heads % 8 or config.n_heads == 8:
        del variants["grouped"]
    values: dict[str, float] = {}
    for name, n_kv_heads in variants.items():
        values[f"per_token_{name}"] = kv_cache_bytes_per_token(config, n_kv_heads)
        values[f"context_{name}"] = kv_cache_bytes_per_token(config, n_kv_heads) * context
    values["full_over_this"] = config.n_heads / config.n_kv_heads
    return plan_section("kv_cache", values, model=config, context=context)


def _memory_section(config: ModelConfig, options: PlanOptions, context: int) -> PlanSection:
    gpu, layout, batch = options.gpu, options.serving, options.batch
    stage_layers = math.ceil(config.n_layers / layout.pipeline)
    weights = weight_bytes_per_gpu(config, layout)
    in_stage = kv_cache_bytes_per_token(config) * stage_layers / config.n_layers
    per_position = in_stage * layout.pipeline * cache_share(config.n_kv_heads, batch, layout.tensor)
    cache_bytes, room = per_position * batch * context, max(0.0, gpu.memory_bytes - weights)
    values = {
        "gpus_per_copy": layout.model_gpus,
        "weights_per_gpu": weights,
        "cache_per_gpu": cache_bytes,
        "gpu_memory": gpu.memory_bytes,
        "fits": weights + cache_bytes <= gpu.memory_bytes,
        "sequences_that_fit": int(room / (in_stage / layout.tensor * context)),
        "context_that_fits": int(room / (per_position * batch)),
    }
    has_room = weights <= gpu.memory_bytes
    return plan_section(
        "serving_memory",
        values,
        {"weights": not has_room, "cache": has_room and not values["fits"]},
        options=options,
        context=context,
        in_flight=batch * layout.pipeline,
        stage=f"the fullest stage, {stage_layers} of {config.n_layers} layers, over {plural(layout.tensor, 'GPU')}",
        most=values["sequences_that_fit"],
        longest=values["context_that_fits"],
    )


def _speed_section(config: ModelConfig, options: PlanOptions, context: int, fits: bool) -> PlanSection:
    gpu, layout, batch = options.gpu, options.serving, options.batch
    alone, together = (decoding_step(config, n, context, layout.tensor) for n in (1, batch))
    alone_seconds, seconds = (step.seconds(gpu, layout.tensor) for step in (alone, together))
    is_reading = together.reading_seconds(gpu, layout.tensor) > together.multiplying_seconds(gpu, layout.tensor)
    stage_seconds = seconds * math.ceil(config.n_layers / layout.pipeline) / config.n_layers
    throughput = layout.data_parallel * batch / stage_seconds
    cost = 1000 * options.price * layout.n_gpus / (3600 * throughput)
    values = {
        "copies": layout.data_parallel,
        "spare_gpus": layout.spares,
        "bytes_read_alone": alone.weight_bytes + alone.cache_bytes,
        "seconds_per_token_alone": alone_seconds,
        "tokens_per_second_alone": 1 / alone_seconds,
        "seconds_per_token": seconds,
        "tokens_per_second_each": 1 / seconds,
        "tokens_per_second_cluster": throughput,
        "bound": "memory bandwidth" if is_reading else "compute",
        "compute_bound_batch": compute_bound_batch(config, gpu),
        "compute_bound_batch_with_cache": compute_bound_batch(config, gpu, context),
        **({} if config.is_dense else _experts_touched(config, batch)),
        "cost_per_thousand_tokens": cost,
        "cost_per_million_tokens": 1000 * cost,
    }
    applies = {"does_not_fit": not fits, "spares": layout.spares > 0, "too_long": context > config.max_seq_len}
    return plan_section("serving_speed", values, applies, options=options, model=config, context=context)


def _experts_touched(config: ModelConfig, batch: int) -> dict[str, Any]:
    E, K = config.n_experts, config.top_k
    batches = {"1": 1, "8": 8, "64": 64, "batch": batch}
    touched = {f"experts_touched_{name}": expected_experts_touched(E, K, n) for name, n in batches.items()}
    return {**touched, "tokens_per_expert": batch * K / E}


def expected_tokens_per_step(acceptance: float, gamma: int) -> float:
    """Return (1 - α^(γ+1)) / (1 - α): tokens that a verification of γ drafted ones yields (arXiv 2211.17192, eq. 1).

    Between 1 (nothing drafted or nothing accepted) and γ + 1 (everything accepted), where each drafted token is
    accepted with probability α, independently of the others.
    """
    require(Rate, acceptance=acceptance)
    require(DraftedTokens, gamma=gamma)
    return math.fsum(acceptance**i for i in range(gamma + 1))


def speculative_speedup(acceptance: float, draft_cost: float, gamma: int) -> float:
    """Return (1 - α^(γ+1)) / ((1 - α)(γ c + 1)): improvement in walltime (arXiv 2211.17192, theorem 3.8).

    Args:
        acceptance: α.
        draft_cost: c, a step of the draft model over a step of the model.
        gamma: γ, tokens drafted at a time. Verifying them is taken to last as long as decoding one token.
    """
    require(NonNegative, draft_cost=draft_cost)
    return expected_tokens_per_step(acceptance, gamma) / (gamma * draft_cost + 1)


def best_gamma(acceptance: float, draft_cost: float, max_gamma: int = 64) -> int:
    """Return the γ up to ``max_gamma`` with the highest ``speculative_speedup``, the least of equals.

    0 where acceptance <= draft_cost: drafting then never pays (arXiv 2211.17192, corollary 3.9). With acceptance 1,
    or a draft that is free, more is always better and the answer is ``max_gamma``.
    """
    return max(range(max_gamma + 1), key=lambda gamma: (speculative_speedup(acceptance, draft_cost, gamma), -gamma))


def speculative_speedup_on(config: ModelConfig, options: PlanOptions, n_sequences: int, context: int) -> float:
    """Return the improvement in walltime where verifying costs what it costs.

    The γ + 1 tokens of a verification touch more experts than one token does, and multiply γ + 1 times as much; the
    paper's formula counts neither. Below 1 where the batch is compute-bound already. Each new token sees ``context``
    positions.
    """
    gpu, tensor, gamma = options.gpu, options.serving.tensor, options.gamma
    plain = decoding_step(config, n_sequences, context, tensor).seconds(gpu, tensor)
    verifying = decoding_step(config, n_sequences, context, tensor, tokens_each=gamma + 1).seconds(gpu, tensor)
    tokens = expected_tokens_per_step(options.acceptance, gamma)
    return tokens * plain / (verifying + gamma * options.draft_cost * plain)


def speculation_section(config: ModelConfig, options: PlanOptions, context: int) -> PlanSection:
    """Return the section ``speculative_decoding``: the paper's gain, the best gamma, and the gain on this hardware."""
    acceptance, draft_cost, gamma = options.acceptance, options.draft_cost, options.gamma
    best = best_gamma(acceptance, draft_cost)
    batches = {"1": 1, "64": 64, "batch": options.batch}
    values = {
        **{"acceptance": acceptance, "draft_cost": draft_cost, "gamma": gamma},
        "tokens_per_step": expected_tokens_per_step(acceptance, gamma),
        "speedup": speculative_speedup(acceptance, draft_cost, gamma),
        "best_gamma": best,
        "best_speedup": speculative_speedup(acceptance, draft_cost, best),
        **{f"speedup_at_{name}": speculative_speedup_on(config, options, n, context) for name, n in batches.items()},
    }
    return plan_section("speculative_decoding", values, options=options)
