"""The optimizer: AdamW, or Muon for the matrices between embedding and output."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moe_gpt.config import OptimizerConfig, Scales, scales_of
from moe_gpt.distributed.cut import gather_moved, local_part, whole_shape
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.moments import kept_type, n_blocks, pack, unpack
from moe_gpt.training.muon import move_along_momentum
from moe_gpt.training.records.norms import group_of

_SQUARE = "exp_avg_sq"
_MEANS = {"adamw": ("exp_avg", _SQUARE), "muon": ("momentum",)}
_FOR_MUON = ("attention", "experts", "feed_forward")
Group = dict[str, Any]


class Optimizer:
    """Groups of parameters, each with its method, and their running means.

    AdamW (Loshchilov and Hutter, arXiv 1711.05101) is PyTorch's fused function, and Muon is ``muon``. This is no
    ``torch.optim.Optimizer``, because one imports PyTorch's compiler when it is made, which takes a second, and keeps
    its state in float32. Of a sharded parameter each rank moves its part, and keeps the state of that part.

    Args:
        groups: each has ``params``, ``weight_decay``, ``method`` (adamw or muon) and ``scales``, by which its learning
            rate and eps are multiplied.
        config: the rest.
    """

    def __init__(self, groups: list[Group], config: OptimizerConfig) -> None:
        self.param_groups, self.config = groups, config
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """The running means of each parameter that has moved, by name, in the form in which they are kept."""
        self.lr = config.lr
        self.methods = {id(p): group["method"] for group in groups for p in group["params"]}
        """The method of each parameter, by ``id``."""

    def state_shapes(self, parameter: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name, shape and type of what a parameter's state has once the parameter has moved."""
        method = self.methods[id(parameter)]
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = (
            {} if method == "muon" else {"step": ((), torch.float32)}
        )
        for name in _MEANS[method]:
            shapes[name] = whole_shape(parameter), kept_type(self.config.state_type, name == _SQUARE)
            if self.config.state_type == "int8":
                shapes[f"{name}_scale"] = (n_blocks(parameter.numel()),), torch.float32
        return shapes

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor, skipped: Tensor) -> None:
        """Move every parameter that has a gradient, without waiting for the device.

        Args:
            lr: learning rate.
            scale: what gradients are divided by.
            skipped: 1 to leave all parameters and running means as they are, else 0.
        """
        self.lr = lr
        take_step = {"adamw": self._take_adamw_step, "muon": self._take_muon_step}
        for group in self.param_groups:
            for part in self._parts(group["params"]):
                take_step[group["method"]](part, group, scale, skipped)
            gather_moved(group["params"])

    def _parts(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield those that move together: one at a time where each is in float32 only while it moves."""
        moving = [parameter for parameter in parameters if parameter.grad is not None]
        size = max(1, len(moving)) if self.config.state_type == "float32" else 1
        yield from (moving[start : start + size] for start in range(0, len(moving), size))

    def _take_adamw_step(self, moving: list[Tensor], group: Group, scale: Tensor, skipped: Tensor) -> None:
        means = [self._means(parameter, "adamw") for parameter in moving]
        steps = [self.state[p].setdefault("step", torch.zeros((), device=p.device)) for p in moving]
        gradients: list[Any] = [local_part(parameter.grad, parameter) for parameter in moving]
        parts, config, clipping = list(map(local_part, moving)), self.config, _clipping(gradients, scale, skipped)
        if clipping is None:
            return
        adamw(
            parts, gradients, [mean[0] for mean in means], [mean[1] for mean in means], [], steps,
            fused=True, amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=self.lr * group["scales"].lr,
            weight_decay=group["weight_decay"], eps=config.eps * group["scales"].eps, maximize=False, **clipping,
        )  # fmt: skip
        for parameter, mean in zip(moving, means, strict=True):
            self._keep(parameter, "adamw", mean)

    def _take_muon_step(self, moving: list[Any], group: Group, scale: Tensor, skipped: Tensor) -> None:
        for parameter in moving:
            means = self._means(parameter, "muon")
            # where the step is skipped, the mean moves nowhere
            gradient = torch.where(skipped.bool(), means[0], local_part(parameter.grad, parameter) / scale)
            lr = self.lr * (1 - skipped)
            move_along_momentum(parameter, gradient, means[0], lr, group["weight_decay"], self.config.momentum)
            self._keep(parameter, "muon", means)

    def _means(self, parameter: Tensor, method: str) -> list[Tensor]:
        """Return a parameter's running means in float32: the kept ones themselves if they are."""
        kept, names = self.state.setdefault(parameter, {}), _MEANS[method]
        if names[0] not in kept:
            return [torch.zeros_like(local_part(parameter), dtype=torch.float32) for _ in names]
        return [unpack(kept[name], kept.get(f"{name}_scale")) for name in names]

    def _keep(self, parameter: Tensor, method: str, means: Sequence[Tensor]) -> None:
        kept = self.state[parameter]
        for name, mean in zip(_MEANS[method], means, strict=True):
            kept[name], scale = pack(mean, self.config.state_type, is_square=name == _SQUARE)
            if scale is not None:
                kept[f"{name}_scale"] = scale

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _clipping(gradients: list[Any], scale: Tensor, skipped: Tensor) -> dict[str, Any] | None:
    """Return how PyTorch's function learns of clipping and of a skipped step; None where there is nothing to do."""
    if scale.device.type != "mps":
        return {"grad_scale": scale, "found_inf": skipped}
    if bool(skipped):  # MPS's fused kernel looks at neither
        return None
    torch._foreach_div_(gradients, scale)
    return {}


def build_optimizer(model: MoEGPT, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer of a model's trainable parameters.

    Weight decay applies to attention, experts, router and output matrices; not to norms and not to the embedding
    (a tied output matrix counts as the embedding). With ``name: muon``, attention and experts take Muon's steps, the
    rest AdamW's. The balancing bias is a buffer, so the optimizer never sees it.

    With ``mup_base``, parameters with the same scales are a group. Their decay is divided by the scale of their
    learning rate, so that a step shrinks all by lr · weight_decay (arXiv 2510.19093).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[str, bool, Scales], Group] = {}
    find_scales = getattr(model, "scales_of", functools.partial(scales_of, model.config))  # of a model that sees
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scales, method = find_scales(name), _method(name, parameter, config)
            decays = parameter.dim() > 1 and id(parameter) not in embeddings
            group = {"weight_decay": config.weight_decay / scales.lr * decays, "method": method, "scales": scales}
            groups.setdefault((method, decays, scales), {"params": [], **group})["params"].append(parameter)
    return Optimizer([groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))], config)


def _method(name: str, parameter: Tensor, config: OptimizerConfig) -> str:
    return config.name if parameter.dim() >= 2 and group_of(name) in _FOR_MUON else "adamw"


def check_optimizer(model: MoEGPT, optimizer: Optimizer) -> None:
    """Raise ``InputError`` if the optimizer lacks a trainable parameter, which would silently never learn."""
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimizer.methods]
    if left_out:
        raise InputError(
            f"the optimizer does not have {', '.join(left_out[:5])}; change the model before the optimizer is built: "
            "give set_up_run or moe_gpt.train a make_router, or freeze these parameters with requires_grad_(False)"
        )


@torch.no_grad()
def update_expert_bias(model: MoEGPT, tokens_per_expert: Tensor, rate: float | Tensor) -> None:
    """Move each expert's balancing bias by ``rate`` towards an even load (arXiv 2408.15664, algorithm 1).

    Args:
        model: one with ``balance: bias``.
        tokens_per_expert: counts (L, E) of the whole batch: all micro-batches and ranks together.
        rate: the paper's u.
    """
    blocks: Any = model.blocks.named_children()
    for layer, block in blocks:  # of a pipeline's stage only some
        counts = tokens_per_expert[int(layer)].float()
        block.feed_forward.router.expert_bias += rate * (counts.mean() - counts).sign()
