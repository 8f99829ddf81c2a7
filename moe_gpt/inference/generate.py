"""Text from a model, token by token, with a key-value cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from moe_gpt.errors import InputError
from moe_gpt.inference.engine import LONGER, Engine, checked_context
from moe_gpt.inference.request import Beside, Request
from moe_gpt.inference.sampling import DAMAGED, SamplingConfig, are_finite, sample
from moe_gpt.inference.speculation import Draft
from moe_gpt.model.cache import KVCache
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast


def generate(
    model: MoEGPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    end_of_text_id: int | None = None,
    precision: Precision = "fp32",
    context: int | None = None,
    draft: Draft | None = None,
    beside: Beside | None = None,
) -> Iterator[int]:
    """Yield new token ids, at most ``max_new_tokens``, until end-of-text (not yielded) or the context is full.

    Args:
        model: put into evaluation mode; the mode is restored at the end.
        prompt: ids, not text; the model sees exactly these.
        max_new_tokens: largest number of new tokens.
        sampling: settings of the sampling; temperature 0.8 by default.
        seed: seed of a separate generator, so that torch's random state does not change.
        end_of_text_id: the token that ends the text; None never stops early.
        precision: compute type.
        context: positions of prompt and new tokens together; ``max_seq_len`` of the model by default.
        draft: guesses tokens, which the model checks several at a time (``speculation``).
        beside: what the tokens read beside the text, such as pictures.

    Raises:
        InputError: at the call, where the prompt is empty, fills the context or is text; at a token, where the logits
            are not finite.
    """
    limit = checked_context(model, context)
    _check_prompt(prompt, limit, model.config.max_seq_len)
    request = Request(
        prompt=prompt,
        max_new_tokens=min(max_new_tokens, limit - len(prompt)),
        sampling=sampling or SamplingConfig(),
        seed=seed,
        ends=() if end_of_text_id is None else (end_of_text_id,),
        beside=beside,
    )
    if draft is None and beside is None:
        return _generate(model, request, precision)
    return _by_engine(model, request, precision, draft)


def _check_prompt(prompt: Sequence[int], limit: int, most: int) -> None:
    if isinstance(prompt, str):
        raise InputError(f"the prompt must be token ids, got {prompt!r}; use moe_gpt.load(...).generate for text")
    if not len(prompt):
        raise InputError("the prompt must have at least one token, got none; give text or --bos (bos=True)")
    if len(prompt) >= limit:
        longer = f"raise the context up to the model's {most} (--context, context=)"
        raise InputError(
            f"the prompt must be shorter than the context of {limit} tokens, got {len(prompt)}; shorten it, or "
            + (longer if limit < most else LONGER)
        )


def _by_engine(model: MoEGPT, request: Request, precision: Precision, draft: Draft | None) -> Iterator[int]:
    with evaluating(model):
        context = len(request.prompt) + request.max_new_tokens
        engine = Engine(model, n_rows=1, context=context, precision=precision, draft=draft)
        if request.max_new_tokens:
            engine.add(request)
        for event in engine.run():
            if event.finish == "error":
                raise InputError(event.error)
            if event.token is not None:
                yield event.token


@torch.inference_mode()
def _generate(model: MoEGPT, request: Request, precision: Precision) -> Iterator[int]:
    device = model.embedding.weight.device
    rng, sampling = random.Random(request.seed), request.sampling  # a seed means the same on every device
    dtype = torch.bfloat16 if precision == "bf16" else model.embedding.weight.dtype
    cache = KVCache(model.config, 1, len(request.prompt) + request.max_new_tokens, device, dtype)
    tokens = torch.tensor([list(request.prompt)], device=device)
    with evaluating(model):
        for _ in range(request.max_new_tokens):
            with autocast(device, precision):
                logits = model.next_token_logits(tokens, cache).float()
            if not are_finite(logits).item():
                raise InputError(DAMAGED)
            token = int(sample(logits, [sampling], [rng.random() if sampling.temperature else 0.0]))
            if token in request.ends:
                return
            yield token
            tokens = torch.tensor([[token]], device=device)
