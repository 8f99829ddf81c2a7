"""L2 norms of parameters, gradients and updates, by group: embedding, attention, routers, experts, norms, output."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def update_norms(model: nn.Module, optimizer: torch.optim.AdamW, skipped: Tensor | float = 0.0) -> dict[str, Tensor]:
    """Return ``<group>/update_norm``: L2 norms of the step that was just taken.

    The optimizer's moments after the step determine it, so no copy of the parameters is needed. AdamW (arXiv
    1711.05101, algorithm 2) has p_new = (1 - lr·wd)·p - lr·d with d = m / (1 - β1^t) / (sqrt(v / (1 - β2^t)) + ε).
    Therefore p - p_new = lr·(d + wd·p_new) / (1 - lr·wd).

    Args:
        skipped: 1 if the step was skipped and moved nothing, else 0.
    """
    has_stayed = torch.as_tensor(skipped, device=next(model.parameters()).device).bool()
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def update(parameter: Tensor) -> Tensor | None:
        state, group = optimizer.state.get(parameter), settings.get(id(parameter))
        if not state or group is None:
            return None
        (beta1, beta2), lr, decay, t = group["betas"], group["lr"], group["weight_decay"], state["step"]
        direction = state["exp_avg_sq"].div(1 - beta2**t).sqrt_().add_(group["eps"])
        direction = state["exp_avg"].div(1 - beta1**t).div_(direction)
        moved = direction.add_(parameter, alpha=decay).mul_(lr / (1 - lr * decay))
        return moved.masked_fill_(has_stayed, 0.0)

    return _norms(model, "update_norm", update)


def _norms(model: nn.Module, kind: str, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    norms: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        tensor = value(parameter)
        if tensor is not None:
            norms.setdefault(f"{group_of(name)}/{kind}", []).append(total_norm([tensor]))
    return {key: total_norm(parts) for key, parts in norms.items()}
