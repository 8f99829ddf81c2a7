"""Applying a ``torch.autograd.Function``, with gradients or without."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply a function with a custom gradient; where gradients are off, as in decoding, just compute it."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NothingToSave(), *arguments)


class _NothingToSave:
    """Stands for autograd's context where there will be no backward pass."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        """Forget them."""
