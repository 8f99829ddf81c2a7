"""L2 norms of parameters, gradients and updates, by group: embedding, attention, routers, experts, norms, output."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_gpt.distributed.sharding import sharded_norm

_GROUPS = (
    ("norms", r"norm\.weight$"),
    ("routers", r"\.router\."),
    ("experts", r"\.experts\."),
    ("feed_forward", r"\.feed_forward\."),
    ("attention", r"\.attention\."),
    ("embedding", r"^embedding\."),
    ("output", r"^output\."),
)


def group_of(name: str) -> str:
    """Return the group of a parameter by its name; ``other`` if no group fits."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name)), "other")


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all the numbers in ``tensors`` together, a float32 scalar."""
    if hasattr(tensors[0], "placements"):
        return sharded_norm(tensors)
    if tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm([x.float() for x in tensors])
    # row by row, because PyTorch computes the norm of a whole tensor in one thread
    rows = [x.flatten(0, -2) if x.dim() > 1 else x.reshape(1, -1) for x in tensors]
    return torch.linalg.vector_norm(torch.cat([torch.linalg.vector_norm(x.float(), dim=1) for x in rows]))


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return ``<group>/gradient_norm``: L2 norms of the gradients, before clipping."""
    return _norms(model, "gradient_norm", lambda parameter: parameter.grad)


def parameter_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return ``<group>/parameter_norm``: L2 norms of the parameters."""
    return _norms(model, "parameter_norm", lambda parameter: parameter.detach())


def copy_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that have a gradient, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def update_norms(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``<group>/update_norm``: L2 norms of how far parameters have moved from their values ``before``."""
    moved = {
        id(p): (p - before[name]).masked_fill_(p == before[name], 0.0)
        for name, p in model.named_parameters()
        if name in before
    }
    return _norms(model, "update_norm", lambda parameter: moved.get(id(parameter)))


def _norms(model: nn.Module, kind: str, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    norms: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        tensor = value(parameter)
        if tensor is not None:
            norms.setdefault(f"{group_of(name)}/{kind}", []).append(total_norm([tensor]))
    return {key: total_norm(parts) for key, parts in norms.items()}
