"""A model whose tensors have shapes but no values, to count a config's parameters and bytes without memory for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moe_gpt.config import ModelConfig
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.transformer import MoEGPT


def shapes_only(
    config: ModelConfig, make_router: MakeRouter = Router, kind: Callable[[ModelConfig, MakeRouter], MoEGPT] = MoEGPT
) -> MoEGPT:
    """Return a model on the meta device: no memory and no time for weights, whatever the size.

    Where ``config.vocab_size`` is None the embedding has one row.
    """
    with torch.device("meta"), _NothingDrawn():
        return kind(config if config.vocab_size else dataclasses.replace(config, vocab_size=1), make_router)


class _NothingDrawn(TorchFunctionMode):
    """Skips the functions of torch.nn.init: on the meta device they import torch._dynamo, which takes seconds."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":  # return the tensor to fill, as these functions do
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
