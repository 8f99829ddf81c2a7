"""The sections of a plan that say what serving a model takes: cache, memory, speed and money, speculative decoding."""

from __future__ import annotations

import dataclasses
import math

from moe_gpt.config import ModelConfig
from moe_gpt.plan.hardware import Gpu
from moe_gpt.plan.inference_cost import (
    Layout,
    best_gamma,
    cache_share,
    compute_bound_batch,
    cost_per_thousand_tokens,
    decoding_step,
    expected_experts_touched,
    expected_tokens_per_step,
    kv_cache_bytes_per_token,
    require_count,
    speculative_speedup,
    speculative_speedup_on,
    tokens_per_expert,
    weight_bytes_per_gpu,
)
from moe_gpt.plan.quantities import PlanSection, Quantity

_POPE, _LEVIATHAN = "arXiv 2211.05102", "arXiv 2211.17192"
_ROOFLINE = f"{_POPE} section 2: the longer of reading and multiplying, at full speed, nothing else counted"


def inference_sections(
    config: ModelConfig,
    gpu: Gpu,
    *,
    n_gpus: int = 128,
    tensor: int = 8,
    pipeline: int = 16,
    batch: int = 4096,
    context: int = 8192,
    price_per_gpu_hour: float = 1.0,
    acceptance: float = 0.8,
    draft_cost: float = 0.05,
    gamma: int = 4,
) -> tuple[PlanSection, ...]:
    """Return the sections ``kv_cache``, ``serving_memory``, ``serving_speed`` and ``speculative_decoding``.

    Args:
        config: the shape; weights and cache in bfloat16.
        gpu: one of the cluster's GPUs.
        n_gpus: of the cluster; as many copies of the model as fit, the rest is spare but paid for.
        tensor: GPUs that share a layer.
        pipeline: stages of a copy.
        batch: sequences that pass through a stage together; every stage has such a batch in flight.
        context: positions that each new token sees.
        price_per_gpu_hour: dollars.
        acceptance: probability that a drafted token is accepted.
        draft_cost: a step of the draft model over a step of the model.
        gamma: tokens drafted at a time.

    Raises:
        InputError: in one line, for fewer GPUs than tensor × pipeline, heads or layers that do not go round, values
            that are negative, zero or no probability.
    """
    layout = Layout(tensor, pipeline)
    layout.check(config, n_gpus)
    require_count(batch=batch, context=context)
    memory = _memory_section(config, gpu, layout, batch, context)
    speed = _speed_section(config, gpu, layout, n_gpus, batch, context, price_per_gpu_hour)
    if not memory["fits"]:
        note = "This batch does not fit at this context (see serving_memory): speed and cost are what it would have."
        speed = dataclasses.replace(speed, notes=[note, *speed.notes])
    return (
        _cache_section(config, context),
        memory,
        speed,
        _speculation_section(config, gpu, tensor, batch, context, acceptance, draft_cost, gamma),
    )


def _cache_section(config: ModelConfig, context: int) -> PlanSection:
    heads = "1 key-value head" if config.n_kv_heads == 1 else f"{config.n_kv_heads} key-value heads"
    variants = [("this_model", config.n_kv_heads, f"{heads}, as configured")]
    if config.n_heads % 8 == 0 and config.n_heads > 8:
        variants.append(("grouped", 8, "8 key-value heads (grouped)"))
    variants.append(("full", config.n_heads, f"{config.n_heads} key-value heads (full)"))
    quantities = []
    for name, n_kv_heads, label in variants:
        size, formula = kv_cache_bytes_per_token(config, n_kv_heads), f"2 · n_layers · {n_kv_heads} · head_dim · 2 B"
        source = "keys and values of every layer; arXiv 1911.02150 (one head), arXiv 2305.13245 (grouped)"
        quantities += [
            Quantity(f"per_token_{name}", size, "bytes/token", f"per token, {label}", formula, source),
            Quantity(
                f"context_{name}", size * context, "bytes", f"{context} tokens, {label}", f"{formula} · context", source
            ),
        ]
    ratio = config.n_heads / config.n_kv_heads
    quantities.append(
        Quantity("full_over_this", ratio, "ratio", "full heads over this model's", "n_heads / n_kv_heads", "counted")
    )
    return PlanSection("kv_cache", f"Key-value cache of one sequence (bfloat16, context {context})", quantities)


def _memory_section(config: ModelConfig, gpu: Gpu, layout: Layout, batch: int, context: int) -> PlanSection:
    in_flight, stage_layers = batch * layout.pipeline, math.ceil(config.n_layers / layout.pipeline)
    weights = weight_bytes_per_gpu(config, layout)
    per_position = (
        kv_cache_bytes_per_token(config) * stage_layers / config.n_layers * layout.pipeline
    ) * cache_share(config.n_kv_heads, batch, layout.tensor)  # fmt: skip
    cache_bytes, room = per_position * batch * context, max(0.0, gpu.memory_bytes - weights)
    longest = int(room / (per_position * batch))
    most = int(room / (kv_cache_bytes_per_token(config) * stage_layers / config.n_layers / layout.tensor * context))
    fits = weights + cache_bytes <= gpu.memory_bytes
    stage = f"the fullest stage, {stage_layers} of {config.n_layers} layers, over {layout.tensor} GPUs"
    split = f"{_POPE} section 3.3 (cache divided by heads, then by sequences)"
    notes = [f"{in_flight} sequences at a time: {layout.pipeline} batches of {batch}, one in each stage."]
    if weights > gpu.memory_bytes:
        notes.append(f"The weights do not fit on {gpu.name}: more GPUs per copy, or fewer bytes per weight.")
    elif not fits:
        notes.append(
            f"The cache does not fit on {gpu.name}: {most} sequences do at context {context}, or a mean context of "
            f"{longest} tokens in this batch; fewer key-value heads or an 8-bit cache also help."
        )
    return PlanSection(
        name="serving_memory",
        title=f"Memory per GPU when serving ({gpu.name}, tensor {layout.tensor} x pipeline {layout.pipeline})",
        quantities=[
            Quantity("gpus_per_copy", layout.gpus, "GPUs", "GPUs of one copy", "tensor · pipeline", "given"),
            Quantity("weights_per_gpu", weights, "bytes", "weights", f"2 B · parameters of {stage}", "counted"),
            Quantity(
                "cache_per_gpu", cache_bytes, "bytes", f"cache of {in_flight} sequences of {context} tokens",
                f"batch · pipeline · context · cache per token, on {stage}", split,
            ),
            Quantity("gpu_memory", gpu.memory_bytes, "bytes", f"memory of {gpu.name}", "given", gpu.source),
            Quantity("fits", fits, "text", "weights and cache fit", "their sum <= memory", "activations left out"),
            Quantity(
                "sequences_that_fit", most, "count", f"sequences of {context} tokens that fit",
                "(memory - weights) · tensor / cache of a sequence in the stage", split,
            ),
            Quantity(
                "context_that_fits", longest, "tokens", "mean context at which the batches fit",
                "(memory - weights) / (cache per token and GPU · batch · pipeline)", split,
            ),
        ],
        notes=notes,
    )  # fmt: skip


def _speed_section(
    config: ModelConfig, gpu: Gpu, layout: Layout, n_gpus: int, batch: int, context: int, price: float
) -> PlanSection:
    copies, spares = divmod(n_gpus, layout.gpus)
    alone, together = (decoding_step(config, n, context, layout.tensor) for n in (1, batch))
    alone_seconds, seconds = (step.seconds(gpu, layout.tensor) for step in (alone, together))
    stage_seconds = seconds * math.ceil(config.n_layers / layout.pipeline) / config.n_layers
    throughput = copies * batch / stage_seconds
    reading, multiplying = (f(gpu, layout.tensor) for f in (together.reading_seconds, together.multiplying_seconds))
    bound = "compute" if multiplying >= reading else "memory bandwidth"
    reads = "max(bytes / (tensor · bandwidth), FLOPs / (tensor · FLOP/s)), stages in turn"
    quantities = [
        Quantity("copies", copies, "count", f"copies on {n_gpus} GPUs", "n_gpus // (tensor · pipeline)", "given"),
        Quantity("spare_gpus", spares, "GPUs", "GPUs left over", "n_gpus mod (tensor · pipeline)", "given"),
        Quantity(
            "bytes_read_alone", alone.weight_bytes + alone.cache_bytes, "bytes", "read per token at batch 1",
            "active weights + cache; each tensor-parallel GPU reads a shared key-value head for itself", _ROOFLINE,
        ),
        Quantity("seconds_per_token_alone", alone_seconds, "seconds", "time per token at batch 1", reads, _ROOFLINE),
        Quantity(
            "tokens_per_second_alone", 1 / alone_seconds, "tokens/s", "speed of a sequence at batch 1", "1 / time",
            _ROOFLINE,
        ),
        Quantity("seconds_per_token", seconds, "seconds", f"time per token at batch {batch}", reads, _ROOFLINE),
        Quantity(
            "tokens_per_second_each", 1 / seconds, "tokens/s", f"speed of a sequence at batch {batch}", "1 / time",
            _ROOFLINE,
        ),
        Quantity(
            "tokens_per_second_cluster", throughput, "tokens/s", "speed of the cluster, a batch in every stage",
            "copies · batch / time of the fullest stage", _ROOFLINE,
        ),
        Quantity("bound", bound, "text", f"limit at batch {batch}", reads, _ROOFLINE),
        *_batch_quantities(config, gpu, batch, context),
        Quantity(
            "cost_per_thousand_tokens", cost_per_thousand_tokens(price, n_gpus, throughput), "dollars",
            f"cost of 1000 tokens at ${price:g} per GPU-hour", "1000 · price · n_gpus / (3600 · tokens/s)",
            "arithmetic",
        ),
        Quantity(
            "cost_per_million_tokens", 1000 * cost_per_thousand_tokens(price, n_gpus, throughput), "dollars",
            "cost of a million tokens", "1000 · cost_per_thousand_tokens", "arithmetic",
        ),
    ]  # fmt: skip
    notes = [
        "Upper bounds: links between GPUs, kernels' launch and real kernels' efficiency, prompts and empty places in "
        "the batch all cost more. Experts are taken as chosen uniformly.",
    ]
    if spares:
        notes.append(f"{spares} GPUs are spare: {copies * layout.gpus} of {n_gpus} work, all are paid for.")
    if context > config.max_seq_len:
        notes.append(f"A context of {context} is beyond the model's max_seq_len of {config.max_seq_len}.")
    return PlanSection("serving_speed", f"Decoding speed and cost ({gpu.name}, context {context})", quantities, notes)


def _batch_quantities(config: ModelConfig, gpu: Gpu, batch: int, context: int) -> list[Quantity]:
    experts, top_k = config.n_experts, config.top_k
    at_balance = "weights read / bandwidth = FLOPs / (FLOP/s)"
    quantities = [
        Quantity(
            "compute_bound_batch", compute_bound_batch(config, gpu), "count",
            "batch from which multiplying takes longer than reading the weights", at_balance, _ROOFLINE,
        ),
        Quantity(
            "compute_bound_batch_with_cache", compute_bound_batch(config, gpu, context), "count",
            f"the same with caches of {context} tokens", f"{at_balance}, cache and attention scores added", _ROOFLINE,
        ),
    ]  # fmt: skip
    if config.is_dense:
        return quantities
    for name, n_tokens in (("1", 1), ("8", 8), ("64", 64), ("batch", batch)):
        touched, formula = expected_experts_touched(experts, top_k, n_tokens), "E (1 - (1 - K/E)^B)"
        label = f"experts of {experts} in a layer that a batch of {n_tokens} touches"
        quantities.append(
            Quantity(f"experts_touched_{name}", touched, "count", label, formula, "exact for uniform choices")
        )
    share = tokens_per_expert(experts, top_k, batch)
    quantities.append(
        Quantity("tokens_per_expert", share, "count", f"tokens per expert at batch {batch}", "B K / E", "arithmetic")
    )
    return quantities


def _speculation_section(
    config: ModelConfig,
    gpu: Gpu,
    tensor: int,
    batch: int,
    context: int,
    acceptance: float,
    draft_cost: float,
    gamma: int,
) -> PlanSection:
    best = best_gamma(acceptance, draft_cost)
    tokens = expected_tokens_per_step(acceptance, gamma)
    given = f"alpha = {acceptance:g}, c = {draft_cost:g}, gamma = {gamma}"
    gain, theorem = "(1 - alpha^(gamma+1)) / ((1 - alpha) (gamma c + 1))", f"{_LEVIATHAN} theorem 3.8"
    quantities = [
        Quantity("acceptance", acceptance, "fraction", "drafted tokens accepted, alpha", "given", "given"),
        Quantity("draft_cost", draft_cost, "fraction", "draft step over model step, c", "given", "given"),
        Quantity("gamma", gamma, "count", "tokens drafted at a time", "given", "given"),
        Quantity(
            "tokens_per_step", tokens, "tokens", f"expected tokens per step ({given})",
            "(1 - alpha^(gamma+1)) / (1 - alpha)", f"{_LEVIATHAN} eq. 1",
        ),
        Quantity("speedup", speculative_speedup(acceptance, draft_cost, gamma), "ratio", "speed-up", gain, theorem),
        Quantity("best_gamma", best, "count", "best gamma for alpha and c", "argmax of the speed-up up to 64", theorem),
        Quantity(
            "best_speedup", speculative_speedup(acceptance, draft_cost, best), "ratio", "speed-up there", gain, theorem
        ),
    ]  # fmt: skip
    for name, n in (("at_1", 1), ("at_64", 64), ("at_batch", batch)):
        actual = speculative_speedup_on(
            config, gpu, n, context, tensor, acceptance=acceptance, draft_cost=draft_cost, gamma=gamma
        )
        how = "tokens per step · t(1) / (t(gamma + 1) + gamma c t(1)), t from bytes and FLOPs"
        label = f"speed-up at batch {n}, experts and products of the verification counted"
        quantities.append(Quantity(f"speedup_{name}", actual, "ratio", label, how, _ROOFLINE))
    return PlanSection(
        name="speculative_decoding",
        title="Speculative decoding",
        quantities=quantities,
        notes=[
            "The paper's speed-up takes verifying to last as long as decoding one token. In a mixture of experts the "
            "tokens of a verification touch more experts than one token does, and in a large batch every product "
            "costs time: the last rows count both, for experts chosen independently (neighbours of one text agree "
            "more, so that a small batch gains more than its row says).",
        ],
    )
