"""Answers that a policy samples, and their log-probabilities under a model that learns from them.

Sampling decodes with a key-value cache; scoring reads whole answers at once, as training does. In float32 both give
the same log-probabilities up to rounding, so that the first importance ratio is 1. Settings under which they cannot
are refused (``require_exact``).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils import parametrize

from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.inference.sampling import DAMAGED, are_finite, draw
from moe_gpt.model.cache import KVCache
from moe_gpt.model.losses import RouterStats, router_stats
from moe_gpt.model.router import Router, Routing
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import Precision, autocast
from moe_gpt.post_training.policy import entropy, token_log_probs


class Rollout(NamedTuple):
    """B = prompts · samples rows, those of a prompt one after another. A row is padding, prompt, answer, padding."""

    tokens: Int[Tensor, "B S"]
    """Prompts fill the first S - N columns, answers the last N."""
    valid: Bool[Tensor, "B S"]
    """False at padding."""
    is_answer: Bool[Tensor, "B N"]
    """Which of the last N columns were sampled; the token that ends an answer was."""
    log_probs: Float[Tensor, "B N"]
    """Of the sampled tokens, in nats, as the sampler computed them; 0 at padding."""

    @property
    def answers(self) -> Int[Tensor, "B N"]:
        """The part of the tokens that holds answers."""
        return self.tokens[:, -self.is_answer.shape[1] :]

    def rows(self, start: int, end: int) -> Rollout:
        """Return some of the rows, for a micro-batch."""
        return Rollout(*(part[start:end] for part in self))


class Scored(NamedTuple):
    """A rollout under a model, with gradients where they are on."""

    log_probs: Float[Tensor, "B N"]
    """Of the answers' tokens, in nats, 0 at padding."""
    entropy: Float[Tensor, "B N"]
    """Of the distributions that they were sampled from, in nats, without gradient, 0 at padding."""
    router_stats: RouterStats | None
    """Of all tokens but padding; None if dense."""
    routings: list[Routing]
    """One of each layer, for ``replaying``."""


def answers_of(rollout: Rollout) -> list[list[int]]:
    """Return the tokens of each answer."""
    return [answer[mask].tolist() for answer, mask in zip(rollout.answers, rollout.is_answer, strict=True)]


def require_exact(config: ModelConfig) -> None:
    """Raise ``InputError`` for settings under which a sampled token has another probability when it is scored."""
    if config.router_noise:
        raise InputError(
            f"model.router_noise must be 0 in reinforcement, got {config.router_noise}: noise routes a sampled token "
            "anew when it is scored; fine-tune with model.router_noise=0"
        )
    if config.capacity_factor is not None:
        raise InputError(
            f"model.capacity_factor must be null in reinforcement, got {config.capacity_factor}: which tokens are "
            "dropped depends on the other rows; fine-tune with model.capacity_factor=null"
        )


@torch.no_grad()  # not inference_mode, whose tensors no later backward pass may save
def sample(
    model: MoEGPT,
    prompts: Sequence[Sequence[int]],
    n_samples: int,
    max_new_tokens: int,
    ends: Collection[int],
    *,
    seed: int,
    step: int,
    first_row: int = 0,
    temperature: float = 1.0,
    precision: Precision = "fp32",
) -> Rollout:
    """Sample ``n_samples`` answers to each prompt, all at once, each with random numbers of its own.

    The numbers follow from (seed, step, row), so that a run which is killed and resumed samples the same answers, and
    so does one that deals the rows out in smaller batches.

    Args:
        model: put into evaluation mode for this call.
        prompts: ids; none is empty.
        n_samples: answers to each prompt.
        max_new_tokens: longest answer, its end included.
        ends: tokens that end an answer.
        seed: the run's.
        step: the optimizer step that the answers are for.
        first_row: number of the first row, where a batch is sampled in parts.
        temperature: divides the logits, above 0.
        precision: compute type.

    Raises:
        InputError: for a prompt that is empty or too long, a temperature that is not above 0, settings that
            ``require_exact`` refuses, and weights that give no finite logits.
    """
    require_exact(model.config)
    _check(model.config, prompts, max_new_tokens, temperature)
    tokens, valid = left_padded([prompt for prompt in prompts for _ in range(n_samples)])
    rngs = [random.Random(f"{seed} {step} {first_row + row}") for row in range(len(tokens))]
    with evaluating(model), parametrize.cached():  # adapted weights are computed once, not for each token
        device = model.embedding.weight.device
        return _decode(model, tokens.to(device), valid.to(device), max_new_tokens, ends, rngs, temperature, precision)


def _decode(
    model: MoEGPT,
    tokens: Tensor,
    valid: Tensor,
    max_new_tokens: int,
    ends: Collection[int],
    rngs: Sequence[random.Random],
    temperature: float,
    precision: Precision,
) -> Rollout:
    """Append tokens to all rows until each has ended; what is drawn for a row after its end is padding."""
    device = tokens.device
    dtype = torch.bfloat16 if precision == "bf16" else model.embedding.weight.dtype
    cache = KVCache(model.config, len(tokens), tokens.shape[1] + max_new_tokens, device, dtype)
    is_open = torch.ones(len(tokens), 1, dtype=torch.bool, device=device)
    ending, new, all_log_probs = torch.tensor(sorted(ends), device=device), tokens, list[Tensor]()
    while len(all_log_probs) < max_new_tokens and is_open.any():
        with autocast(device, precision):
            logits = model.output(model.hidden_states(new, valid, cache)[0][:, -1:]).float()
        if not are_finite(logits[:, 0]).all():
            raise InputError(DAMAGED)
        new = draw((logits[:, 0] / temperature).softmax(-1), [rng.random() for rng in rngs])[:, None]
        tokens, valid = torch.cat([tokens, new], dim=1), torch.cat([valid, is_open], dim=1)
        all_log_probs.append(token_log_probs(logits, new, temperature))
        is_open = is_open & ~torch.isin(new, ending)
    log_probs = torch.cat(all_log_probs, dim=1)
    is_answer = valid[:, -log_probs.shape[1] :]
    return Rollout(tokens.masked_fill(~valid, 0), valid, is_answer, log_probs.masked_fill(~is_answer, 0.0))


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature must be above 0 in reinforcement, got {temperature}; 1 samples from the model")
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not min(lengths):
        raise InputError(f"each prompt must have at least one token, got {lengths}")
    if not 0 < max_new_tokens <= config.max_seq_len - max(lengths):
        raise InputError(
            f"max_new_tokens must be at least 1, and fit with the prompt into model.max_seq_len={config.max_seq_len}, "
            f"got {max_new_tokens} behind a prompt of {max(lengths)} tokens; change it or leave long prompts out"
        )


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return prompts (B, P) that all end in the last column, and which places are no padding."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    n_padding = torch.tensor([[width - len(prompt)] for prompt in prompts])
    return torch.tensor(rows), torch.arange(width) >= n_padding


def score(model: MoEGPT, rollout: Rollout, temperature: float = 1.0, precision: Precision = "fp32") -> Scored:
    """Read whole answers at once and return the log-probabilities of their tokens, with gradients where they are on.

    Args:
        model: the policy, or the reference.
        rollout: the answers.
        temperature: that they were sampled with.
        precision: compute type.
    """
    N, mask = rollout.is_answer.shape[1], rollout.is_answer
    with autocast(rollout.tokens.device, precision):
        hidden, routings = model.hidden_states(rollout.tokens, rollout.valid)
        logits = model.output(hidden[:, -N - 1 : -1])  # each position predicts the token after it
    log_probs = token_log_probs(logits, rollout.answers, temperature)
    return Scored(
        log_probs.masked_fill(~mask, 0.0),
        entropy(logits.detach(), temperature).masked_fill(~mask, 0.0),
        router_stats(routings, rollout.valid),
        routings,
    )


@contextlib.contextmanager
def replaying(model: MoEGPT, routings: Sequence[Routing]) -> Iterator[None]:
    """Let each router choose the experts of a recording, with weights and gradients from its own logits.

    Where one rollout serves several updates, a token's experts then stay those of the first pass, and ratios compare
    the same experts (R3, arXiv 2510.11370). Every pass must read the tokens of the recording.

    Raises:
        InputError: for a router whose ``forward`` is its own, because it may not ask ``scores``.
    """
    routers: list[Any] = [layer.router for layer in model.moe_layers()]
    for router, routing in zip(routers, routings, strict=True):
        if type(router).forward is not Router.forward:
            raise InputError(f"routes can be replayed with routers that override logits only, got {type(router)}")
        E, K = router.weight.shape[0], routing.expert_indices.shape[1]
        ranks = torch.arange(K, 0, -1.0, device=routing.expert_indices.device).expand_as(routing.expert_indices)
        wanted = ranks.new_zeros(len(ranks), E).scatter(1, routing.expert_indices, ranks)
        router.scores = lambda x, router_probs, wanted=wanted: wanted
    try:
        yield
    finally:
        for router in routers:
            vars(router).pop("scores", None)
