"""Texts that a run generates at its evaluations, so that a person sees what it has learned."""

from __future__ import annotations

from collections.abc import Iterator

from moe_gpt.inference.generate import SamplingConfig, generate
from moe_gpt.ops.device import without_compiler
from moe_gpt.training.setup import Run


def generate_samples(run: Run, n_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield each source's name, and its prompt with ``n_tokens`` generated after it; the same model gives the same."""
    tokenizer, limit = run.data.tokenizer, run.config.model.max_seq_len
    sampling = SamplingConfig(temperature=0.6, top_p=0.95)
    for index, source in enumerate(run.data.sources):
        prompt = tokenizer.encode(source.config.prompt)[: limit - 1]
        # single tokens would recompile what was compiled for batches
        with without_compiler():
            new = list(generate(run.state.model, prompt, n_tokens, sampling, index, tokenizer.end_of_text_id))
        yield source.config.name, tokenizer.decode([*prompt, *new])
