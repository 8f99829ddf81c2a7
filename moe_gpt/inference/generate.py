"""Text from a model, token by token, with a key-value cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_gpt.config.section import AtMostOne, CountOrZero, NonNegative, Section
from moe_gpt.errors import InputError
from moe_gpt.model.cache import KVCache
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How the next token is sampled."""

    temperature: NonNegative = 0.8
    """Divides the logits; 0 chooses the most likely token."""
    top_k: CountOrZero = 0
    """Sample from this many most likely tokens; 0 samples from all."""
    top_p: AtMostOne = 1.0
    """Sample from the most likely tokens that together have this probability (nucleus, arXiv 1904.09751)."""


_LEAST_TEMPERATURE = 1e-30


def next_token_probs(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return the distribution (V,) of the next token, after temperature, then top-k, then top-p.

    Raises:
        InputError: where logits are not finite, as those of damaged weights are.
    """
    if not logits.isfinite().all():
        raise InputError(
            "no token can be sampled, because the model's logits are not finite (NaN or infinite); the weights are "
            "damaged, or training diverged, so use an earlier checkpoint"
        )
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    temperature = max(sampling.temperature, _LEAST_TEMPERATURE)  # below, float32 would divide 0 by 0
    logits = (logits.float() - logits.max()) / temperature  # the largest is 0: nothing overflows
    if 0 < sampling.top_k < len(logits):
        logits = logits.index_fill(0, logits.argsort(descending=True, stable=True)[sampling.top_k :], -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # probability of everything more likely
        probs = probs.index_fill(0, order[(before >= sampling.top_p) & (before > 0)], 0.0)
        probs = probs / probs.sum()
    return probs


_LONGER = "load the model with more: --max-seq-len, max_seq_len= of moe_gpt.load"


def checked_context(model: MoEGPT, context: int | None) -> int:
    """Return the positions to use, by default the model's ``max_seq_len``; raise ``InputError`` for more than that."""
    limit, most = context or model.config.max_seq_len, model.config.max_seq_len
    if not 0 < limit <= most:
        raise InputError(f"the context must be from 1 to the model's {most} tokens, got {limit}; or {_LONGER}")
    return limit


def generate(
    model: MoEGPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    end_of_text_id: int | None = None,
    precision: Precision = "fp32",
    context: int | None = None,
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

    Raises:
        InputError: at the call, where the prompt is empty, fills the context or is text; at a token, where the logits
            are not finite.
    """
    limit = checked_context(model, context)
    if isinstance(prompt, str):
        raise InputError(f"the prompt must be token ids, got {prompt!r}; use moe_gpt.load(...).generate for text")
    if not len(prompt):
        raise InputError("the prompt must have at least one token, got none; give text or --bos (bos=True)")
    if len(prompt) >= limit:
        longer = f"raise the context up to the model's {model.config.max_seq_len} (--context, context=)"
        raise InputError(
            f"the prompt must be shorter than the context of {limit} tokens, got {len(prompt)}; shorten it, or "
            + (longer if limit < model.config.max_seq_len else _LONGER)
        )
    n_new = min(max_new_tokens, limit - len(prompt))
    return _generate(model, prompt, n_new, sampling or SamplingConfig(), seed, end_of_text_id, precision)


@torch.inference_mode()
def _generate(
    model: MoEGPT,
    prompt: Sequence[int],
    n_new: int,
    sampling: SamplingConfig,
    seed: int,
    end_of_text_id: int | None,
    precision: Precision,
) -> Iterator[int]:
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same on every device
    dtype = torch.bfloat16 if precision == "bf16" else model.embedding.weight.dtype
    cache = KVCache(model.config, 1, len(prompt) + n_new, device, dtype)
    tokens = torch.tensor([list(prompt)], device=device)
    with evaluating(model):
        for _ in range(n_new):
            with autocast(device, precision):
                logits = model.next_token_logits(tokens, cache)[0]
            probs = next_token_probs(logits.cpu(), sampling)
            token = int(probs.multinomial(1, generator=generator))
            if token == end_of_text_id:
                return
            yield token
            tokens = torch.tensor([[token]], device=device)
