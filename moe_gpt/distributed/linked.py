"""A collective with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


class _Linked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Change, back: Change) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def linked(tensor: Tensor, there: Change, back: Change) -> Tensor:
    """Return ``there(tensor)``, whose gradient goes the way ``back``; ``there`` must not return the tensor itself."""
    return _Linked.apply(tensor, there, back)
