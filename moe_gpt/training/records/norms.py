"""L2 norms of parameters, gradients and updates, by group: embedding, attention, routers, experts, norms, output."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_gpt.distributed.cut import square_sum
from moe_gpt.distributed.process import SOLO, Team

_GROUPS = (
    ("norms", r"norm\.weight$"),
    ("routers", r"\.router\."),
    ("experts", r"\.experts\."),
    ("feed_forward", r"\.feed_forward\."),
    ("attention", r"\.attention\."),
    ("embedding", r"^embedding\."),
    ("output", r"^output\."),
)
_OTHER = "other"


def group_of(name: str) -> str:
    """Return the group of a parameter by its name; ``other`` if no group fits."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name)), _OTHER)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all the numbers in ``tensors`` together, a float32 scalar."""
    if tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm([x.float() for x in tensors])
    # row by row, because PyTorch computes the norm of a whole tensor in one thread
    rows = [x.flatten(0, -2) if x.dim() > 1 else x.reshape(1, -1) for x in tensors]
    return torch.linalg.vector_norm(torch.cat([torch.linalg.vector_norm(x.float(), dim=1) for x in rows]))


def global_norm(model: nn.Module, team: Team = SOLO) -> Tensor:
    """Return the L2 norm of all gradients of the model, of those on other ranks too."""
    if team.size == 1:
        return total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    squares = [square_sum(p.grad, p) for p in model.parameters() if p.grad is not None]
    return team.sum(torch.stack(squares).sum(), "world").sqrt()


def gradient_norms(model: nn.Module, team: Team = SOLO) -> dict[str, Tensor]:
    """Return ``<group>/gradient_norm``: L2 norms of the gradients, before clipping."""
    return _norms(model, "gradient_norm", lambda parameter: parameter.grad, team)


def parameter_norms(model: nn.Module, team: Team = SOLO) -> dict[str, Tensor]:
    """Return ``<group>/parameter_norm``: L2 norms of the parameters."""
    return _norms(model, "parameter_norm", lambda parameter: parameter.detach(), team)


def copy_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that have a gradient, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def update_norms(model: nn.Module, before: Mapping[str, Tensor], team: Team = SOLO) -> dict[str, Tensor]:
    """Return ``<group>/update_norm``: L2 norms of how far parameters have moved from their values ``before``."""
    moved = {
        id(p): (p - before[name]).masked_fill_(p == before[name], 0.0)
        for name, p in model.named_parameters()
        if name in before
    }
    return _norms(model, "update_norm", lambda parameter: moved.get(id(parameter)), team)


def _norms(
    model: nn.Module, kind: str, value: Callable[[nn.Parameter], Tensor | None], team: Team
) -> dict[str, Tensor]:
    groups: dict[str, list[tuple[Tensor, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        tensor = value(parameter)
        if tensor is not None:
            groups.setdefault(group_of(name), []).append((tensor, parameter))
    if team.size > 1:
        found = _norms_of_ranks(groups, team)
    else:
        found = {group: total_norm([total_norm([tensor]) for tensor, _ in pairs]) for group, pairs in groups.items()}
    return {f"{group}/{kind}": norm for group, norm in found.items()}


def _norms_of_ranks(groups: Mapping[str, Sequence[tuple[Tensor, nn.Parameter]]], team: Team) -> dict[str, Tensor]:
    """Return the norm of each group that any rank has."""
    names = [name for name, _ in _GROUPS] + [_OTHER]
    sums = [(sum(square_sum(*pair) for pair in groups.get(name, ())), len(groups.get(name, ()))) for name in names]
    totals = team.sum(torch.tensor(sums), "world")
    return {name: square.sqrt() for name, (square, n) in zip(names, totals, strict=True) if n}
