"""A model whose tensors have shapes but no values, to count a config's parameters and bytes without memory for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError, shown
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.transformer import MoEGPT

_MOST_NUMBERS = 2**60


def shapes_only(config: ModelConfig, make_router: MakeRouter = Router) -> MoEGPT:
    """Return a model on the meta device: no memory and no time for weights, whatever the size.

    Where ``config.vocab_size`` is None the embedding has one row.

    Raises:
        InputError: for a model with a tensor too large for torch to count its bytes.
    """
    heads, experts = 3 * config.n_heads * config.head_dim, 2 * config.n_experts * config.d_ff
    largest = config.d_model * max(config.vocab_size or 1, heads, experts)
    if largest > _MOST_NUMBERS:
        raise InputError(f"a tensor of the model must have at most {_MOST_NUMBERS} numbers, got {shown(largest)}")
    with torch.device("meta"), _NothingDrawn():
        return MoEGPT(config if config.vocab_size else dataclasses.replace(config, vocab_size=1), make_router)


class _NothingDrawn(TorchFunctionMode):
    """Skips the functions of torch.nn.init: on the meta device they import torch._dynamo, which takes seconds."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":  # return the tensor to fill, as these functions do
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
