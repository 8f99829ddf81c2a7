"""Decoding with a key-value cache, against transformers on the exported model: ``moe-gpt bench generate``."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_gpt.bench.contenders import Workload, experts_setting
from moe_gpt.bench.results import Result, tabulate
from moe_gpt.bench.rounds import Turns, require, take_turns, timed
from moe_gpt.inference.quantised import KINDS, quantise, weight_bytes
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.model.cache import KVCache
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import autocast, tune_process

PROMPT_TOKENS = 32
NAMES = ["moe_gpt", "moe_gpt/full heads", "transformers/eager", "transformers/grouped_mm"]
QUANTISED = ["moe_gpt", "moe_gpt/bf16", *(f"moe_gpt/{kind}" for kind in KINDS)]
_COLUMNS = {
    "tokens/s": "{tokens_per_second:count}",
    "first token": "{seconds_to_first_token:seconds}",
    "weights": "{weight_bytes:bytes}",
    "cache": "{cache_bytes:bytes}",
    "moe_gpt is": "{ratio:.2f} x",
}


class Decoded(NamedTuple):
    """Seconds until the first new token, and from there to the last; the bytes of all weights."""

    first: float
    others: float
    weight_bytes: int


def bench_generate(
    workload: Workload, sizes: list[int], n_new: int, rounds: int, say: Callable[[str], None], names: list[str] = NAMES
) -> list[Result]:
    """Measure greedy decoding of ``n_new`` tokens after a prompt of 32, at several batch sizes.

    *Full heads* is the same model with a key-value head for every query head. Transformers gets our model as it is
    exported, and its own ``generate``. ``QUANTISED`` names other types of the weights instead.
    """
    results: list[Result] = []
    say(f"{n_new} new tokens after {PROMPT_TOKENS}; {workload.device}, {workload.precision}")
    for batch_size in sizes:
        make = functools.partial(make_decoder, workload, batch_size, n_new)
        turns = take_turns(names, make, rounds, turns=1, warmup=1, at_once=True, say=say)
        require(turns, "moe_gpt")
        found = [result_of(workload, batch_size, n_new, *turned) for turned in turns.items() if turned[1].values]
        say(tabulate(found, {f"batch of {batch_size}": "{name}", **_COLUMNS}, first_over="tokens_per_second"))
        if batch_size == 1:
            limit = weight_reads(workload)
            fraction = (n_new - 1) / turns["moe_gpt"].median("others") / limit
            found[0]["fraction_of_weight_reads"] = fraction
            say(f"a token's weights can be read from memory {limit:,.0f} times a second; moe_gpt: {fraction:.0%} of it")
        results += found
    return results


def weight_reads(workload: Workload) -> float:
    """Return how often the weights that one token uses could be read from memory in a second.

    Memory is read as fast as in the fastest of nine sums of 256 MB. Weights are float32, as in training. Where they
    fit into a cache, decoding can be faster.
    """
    numbers = torch.ones(1 << 26, device=workload.device)
    seconds = min(timed(numbers.device, numbers.sum) for _ in range(9))
    counts = count_parameters(workload.model)
    used = counts.active - counts.embedding // 2 * (not workload.model.tie_embeddings)  # only a row of the embedding
    return numbers.numel() / seconds / used


def result_of(workload: Workload, batch_size: int, n_new: int, name: str, turns: Turns) -> Result:
    """Return speed and memory of a contender."""
    return {
        "name": f"generate/{name}",
        "batch_size": batch_size,
        "tokens_per_second": batch_size * (n_new - 1) / turns.median("others"),
        "seconds_to_first_token": turns.median("first"),
        "weight_bytes": turns.median("weight_bytes"),
        "cache_bytes": _cache_bytes(workload, name) * batch_size * (PROMPT_TOKENS + n_new),
        "peak_memory_bytes": turns.peak_memory_bytes,
    }


def _cache_bytes(workload: Workload, name: str) -> int:
    """Return the bytes of keys and values of one position."""
    m, itemsize = workload.model, 2 if "bf16" in (workload.precision, name.partition("/")[2]) else 4
    n_kv_heads = m.n_heads if name.endswith("full heads") else m.n_kv_heads
    return 2 * m.n_layers * n_kv_heads * m.head_dim * itemsize


def make_decoder(workload: Workload, batch_size: int, n_new: int, name: str) -> Callable[[], Decoded]:
    """Return what decodes a batch of random prompts with one of ``NAMES``."""
    device = torch.device(workload.device)
    torch.manual_seed(0)
    shape = dataclasses.replace(workload.model, max_seq_len=max(workload.model.max_seq_len, PROMPT_TOKENS + n_new))
    if name.endswith("full heads"):
        shape = dataclasses.replace(shape, n_kv_heads=shape.n_heads)
    model = MoEGPT(shape)
    prompt = torch.randint(shape.vocab_size or 1, (batch_size, PROMPT_TOKENS), device=device)
    if name.startswith("moe_gpt"):
        tune_process(device)
        model, kind = model.to(device).eval(), name.partition("/")[2]
        if kind in KINDS:
            quantise(model, kind)
        elif kind == "bf16":
            model.to(torch.bfloat16)
        return lambda: _decode(model, prompt, n_new, workload)
    theirs = in_transformers(model, name.partition("/")[2]).to(device).eval()
    return lambda: _decode_in_transformers(theirs, prompt, n_new, workload)


@torch.inference_mode()
def _decode(model: MoEGPT, prompt: Tensor, n_new: int, workload: Workload) -> Decoded:
    dtype = torch.bfloat16 if workload.precision == "bf16" else model.embedding.weight.dtype
    started = time.perf_counter()
    cache = KVCache(model.config, len(prompt), prompt.shape[1] + n_new, prompt.device, dtype)
    with autocast(prompt.device, workload.precision):
        tokens = model.next_token_logits(prompt, cache).argmax(-1, keepdim=True)
        tokens.tolist()
        first = time.perf_counter()
        for _ in range(n_new - 1):
            tokens = model.next_token_logits(tokens, cache).argmax(-1, keepdim=True)
        tokens.tolist()
    return Decoded(first - started, time.perf_counter() - first, weight_bytes(model))


def in_transformers(model: MoEGPT, experts: str) -> Any:
    """Return the model as transformers loads it from our export, with one of its implementations of experts."""
    import transformers

    from moe_gpt.interop import hugging_face

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        hugging_face.save(model, Path(folder) / "exported")
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "exported", dtype=torch.float32, **experts_setting(experts)
        )


@torch.inference_mode()
def _decode_in_transformers(model: Any, prompt: Tensor, n_new: int, workload: Workload) -> Decoded:
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    with autocast(prompt.device, workload.precision):
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, **settings).tolist()
        first = time.perf_counter()
        model.generate(prompt, max_new_tokens=n_new, **settings).tolist()
        ended = time.perf_counter()
    return Decoded(first - started, (ended - first) - (first - started), weight_bytes(model))
