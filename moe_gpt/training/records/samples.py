"""Texts that a run generates at each evaluation, to show what it has learned."""

from __future__ import annotations

from collections.abc import Iterator

from moe_gpt.errors import InputError
from moe_gpt.inference.generate import generate
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import without_compiler
from moe_gpt.training.setup import Run


def generate_samples(run: Run, n_tokens: int, model: MoEGPT) -> Iterator[tuple[str, str]]:
    """Yield each source's name, and its prompt continued by ``n_tokens``. The same model gives the same text."""
    tokenizer, limit = run.data.tokenizer, run.config.model.max_seq_len
    sampling = SamplingConfig(temperature=0.6, top_p=0.95)
    for index, source in enumerate(run.data.sources):
        prompt = tokenizer.encode(source.config.prompt)[: limit - 1]
        # the blocks were compiled for batches; single tokens would compile them again
        with without_compiler():
            new = generate(model, prompt, n_tokens, sampling, index, tokenizer.end_of_text_id)
            try:
                text = tokenizer.decode([*prompt, *new])
            except InputError as error:  # of weights that are not finite; training's own checks judge them
                text = f"({error})"
        yield source.config.name, text
