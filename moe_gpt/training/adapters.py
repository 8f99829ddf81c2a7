"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix W acts as W + alpha/rank · B A (section 4.1).

An adapter is a parametrisation of a tensor of the model (``torch.nn.utils.parametrize``), so the model's code does
not know of it. Each expert has an adapter of its own. A checkpoint has the numbers that the tensors act as, so whoever
reads one finds an ordinary model; W, A and B are with the optimizer's state, for who resumes. ``peft_folder.py`` saves
adapters alone and reads them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_gpt.config import AdaptersConfig, RunConfig
from moe_gpt.errors import InputError, shown
from moe_gpt.model.transformer import MoEGPT

_PARTS = ".parametrizations."
"""In the names of what an adapted tensor consists of: W, A and B."""


class LowRank(nn.Module):
    """W + scale · B A, for one matrix or a stack of matrices."""

    def __init__(self, a: Float[Tensor, "*E r n_in"], b: Float[Tensor, "*E n_out r"], scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, weight: Float[Tensor, "*E n_out n_in"]) -> Float[Tensor, "*E n_out n_in"]:
        """Return the adapted weight."""
        if weight.is_meta:  # computing there imports torch._dynamo, which takes seconds
            return weight
        return weight + self.scale * (self.b @ self.a)


def add_adapters(model: MoEGPT, rank: int, alpha: float, targets: Sequence[str] = AdaptersConfig.targets) -> list[str]:
    """Freeze the model and give each target an adapter, with which the model still computes the same.

    A is drawn from torch's generator, uniform up to 1/sqrt(n_in), and B is 0. Call it before the optimizer is built.

    Args:
        model: without adapters.
        rank: r, of each expert too.
        alpha: the scale is alpha/rank.
        targets: matrices of a block by name, where * stands for anything: attention.qkv, attention.out,
            feed_forward.experts.gate_up, feed_forward.experts.down, feed_forward.router (dense: feed_forward.gate_up
            and feed_forward.down).

    Returns:
        the names of the adapted tensors.

    Raises:
        InputError: for a target that fits no matrix, naming those there are, and a model that has adapters already.
    """
    if rank < 1:
        raise InputError(f"adapters.rank must be at least 1, got {rank}")
    names = _targeted(model, targets)
    freeze(model)
    for name in names:
        weight = model.get_parameter(name)
        *stack, n_out, n_in = weight.shape
        a = weight.new_empty(*stack, rank, n_in)
        if not a.is_meta:
            a.uniform_(-(n_in**-0.5), n_in**-0.5)
        adapt(model, name, LowRank(a, weight.new_zeros(*stack, n_out, rank), alpha / rank))
    return names


def _targeted(model: MoEGPT, targets: Sequence[str]) -> list[str]:
    kinds = {
        name: re.sub(r"^blocks\.\d+\.|\.weight$", "", name)
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.") and parameter.dim() > 1
    }
    for target in targets:
        if not any(fnmatch.fnmatchcase(kind, target) for kind in kinds.values()):
            known = ", ".join(sorted(set(kinds.values())))
            raise InputError(f"adapters.targets must name matrices of a block, got {shown(target)}; there are {known}")
    return [name for name, kind in kinds.items() if any(fnmatch.fnmatchcase(kind, target) for target in targets)]


def freeze(model: MoEGPT) -> None:
    """Let nothing learn but what is added later; raise ``InputError`` where there are adapters already."""
    if adapters_of(model):
        raise InputError("the model must have no adapters yet, got some; merge them first")
    model.requires_grad_(False)


def adapt(model: MoEGPT, name: str, adapter: LowRank) -> None:
    """Let a tensor of the model act as the adapter says."""
    owner, _, tensor = name.rpartition(".")
    parametrize.register_parametrization(model.get_submodule(owner), tensor, adapter)


def adapters_of(model: MoEGPT) -> dict[str, LowRank]:
    """Return the adapters by the names of the tensors that they adapt."""
    return {
        name.replace(_PARTS, ".").removesuffix(".0"): module
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name; a shared one appears once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def parts_of_adapted(model: MoEGPT) -> dict[str, Tensor]:
    """Return W, A and B of every adapted tensor by name; none without adapters."""
    return {name: tensor for name, tensor in model.named_parameters() if _PARTS in name}


@torch.no_grad()
def acting_tensors(model: MoEGPT) -> dict[str, Tensor]:
    """Return the tensors by the names of a model without adapters, adapted ones as the numbers that they act as."""
    acting = tensors_of(model)
    for part in parts_of_adapted(model):
        del acting[part]
    for name in adapters_of(model):
        owner, _, tensor = name.rpartition(".")
        acting[name] = getattr(model.get_submodule(owner), tensor)
    return acting


@torch.no_grad()
def merged(model: MoEGPT) -> MoEGPT:
    """Return the model, or a merged copy of one with adapters; torch's generator stays as it is."""
    if not adapters_of(model):
        return model
    with torch.random.fork_rng([]):
        result = type(model)(model.config, model.make_router).to(model.embedding.weight.device)
    acting = acting_tensors(model)
    for name, tensor in tensors_of(result).items():
        tensor.copy_(acting[name])
    return result.train(model.training)


def let_learn(model: MoEGPT, config: RunConfig, new: Collection[str] = ()) -> None:
    """Freeze what does not learn in a run, and add the adapters of its config. Call it before the optimizer is built.

    Args:
        new: parameters that the stage has made, such as the head of a reward model. They learn beside adapters.

    Raises:
        InputError: for a pattern or target that matches nothing, naming what there is.
    """
    names = [name for name, _ in model.named_parameters()]
    if config.train.train_only is not None:
        model.requires_grad_(False)
        _thaw(model, _matching(names, config.train.train_only, "train.train_only"))
    if adapters := config.adapters:
        adapted = add_adapters(model, adapters.rank, adapters.alpha, adapters.targets)
        others = [name for name in names if name not in adapted]
        _thaw(model, [*new, *_matching(others, adapters.also_train, "adapters.also_train")])


def _matching(names: Collection[str], patterns: Sequence[str], key: str) -> set[str]:
    """Return the names in which one of the regular expressions is found; each must be found in one."""
    found = set[str]()
    for pattern in patterns:
        matching = {name for name in names if re.search(pattern, name)}
        if not matching:
            raise InputError(f"{key}: {pattern!r} matches no parameter; names are {', '.join(names)}")
        found |= matching
    return found


def _thaw(model: MoEGPT, names: Collection[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(True)
