"""ZeRO 2 and 3 (arXiv 1910.02054) by FSDP2, the meshes of data ranks, and whole models from parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt.config import RunConfig
from moe_gpt.distributed.cut import Cut, Flat, Holding, Segment, add_others, local_part, whole
from moe_gpt.distributed.layout import Layout, expert_dim
from moe_gpt.model.attention import Attention
from moe_gpt.model.experts import Experts
from moe_gpt.model.transformer import MoEGPT


class Meshes:
    """The ranks of a layout in rows of those that differ in one way alone."""

    def __init__(self, layout: Layout, device_type: str) -> None:
        def mesh(**data_sizes: int) -> DeviceMesh:
            """Return the mesh of all ranks in which the data ranks have these sizes."""
            sizes = {"pipeline": layout.pipeline, **data_sizes, "tensor": layout.tensor}
            ranks = torch.arange(layout.world).view(*sizes.values())
            return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(sizes))

        self.shared = mesh(copy=layout.replicate, shard=layout.shards)
        self.tensor, self.pipeline = self.shared["tensor"], self.shared["pipeline"]
        self.experts = self.shared
        if layout.expert > 1:  # its data ranks hold different experts, too
            n_copies = layout.data // layout.expert // layout.expert_shards
            self.experts = mesh(copy=n_copies, shard=layout.expert_shards, expert=layout.expert)
            self.expert = self.experts["expert"]


def note_holdings(model: MoEGPT, meshes: Meshes, products: Mapping[str, Cut], spread: Mapping[str, Cut]) -> None:
    """Tell every parameter and buffer what this rank holds of it, after tensor ranks and expert ranks have cut some."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        mesh = meshes.experts if name in spread else meshes.shared
        cuts = [of_names[name] for of_names in (products, spread) if name in of_names]
        others = [meshes.tensor] * (name not in products) + [meshes.pipeline] * (name == "embedding.weight")
        held = _held(tensor, mesh["shard"], mesh["copy"])
        is_mine = held.is_mine and not any(other.get_local_rank() for other in others)
        shape = list(tensor.shape)
        for cut in reversed(cuts):
            shape[cut.dim] = cut.length
        tensor.holding = Holding(tuple(shape), (*cuts, *held.cuts), held.moves, held.copies, is_mine)  # type: ignore[attr-defined]


def _held(tensor: Any, shards: DeviceMesh, copies: DeviceMesh) -> Holding:
    """Return what a data rank holds of what all tensor and expert ranks hold."""
    shape, is_mine = tuple(tensor.shape), copies.get_local_rank() == 0
    if hasattr(tensor, "placements"):
        dim = tensor.placements[-1].dim
        return Holding(shape, (Cut(shards, dim, (Segment(shape[dim]),)),), is_mine=is_mine)
    if not isinstance(tensor, nn.Parameter):
        return Holding(shape, is_mine=is_mine and shards.get_local_rank() == 0)
    moves = Flat(shards, shape) if shards.size() > 1 else None
    return Holding(shape, (), moves, copies if copies.size() > 1 else None, is_mine)


def shard(model: MoEGPT, config: RunConfig, layout: Layout, meshes: Meshes) -> None:
    """Shard blocks, attentions that blocks share, spread experts, and the rest, each as one unit of FSDP2."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    _ignore_profiling()
    dim = expert_dim(config, layout) or 0

    def place(parameter: Tensor) -> Shard | None:
        return Shard(dim) if parameter.dim() == 3 else None

    for module in _units(model, layout):
        mesh = meshes.experts if isinstance(module, Experts) else meshes.shared
        fully_shard(
            module,
            mesh=mesh["copy", "shard"],
            reshard_after_forward=layout.zero == 3 and module is not model,
            shard_placement_fn=place,
        )
    for name in ("cross_entropy", "next_token_logits", "routings"):
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply first
            if meshes.shared.device_type == "cpu":
                module.set_custom_reduce_scatter(_ExchangeAndAdd())  # type: ignore[arg-type]


class _ExchangeAndAdd:
    """A reduce-scatter for FSDP2 that is faster than gloo's own."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Send each rank its part of the input, and add what arrives."""
        parts = input_tensor.chunk(dist.get_world_size(group))
        output_tensor.copy_(parts[dist.get_rank(group)])
        add_others(output_tensor, parts, group)


def _units(model: MoEGPT, layout: Layout) -> list[nn.Module]:
    """Return the modules that are sharded each by itself, inner ones first."""
    kinds: Any = (Experts,) * (layout.expert > 1) + (Attention,) * (model.config.attention_sharing > 1)
    return [*(module for module in model.modules() if isinstance(module, kinds)), *model.blocks, model]


def _ignore_profiling() -> None:
    """Let checkpointed regions contain units of FSDP2, whose marks for the profiler are computed anew and not kept."""
    from torch.utils.checkpoint import SAC_IGNORED_OPS

    profiler = torch.ops.profiler
    SAC_IGNORED_OPS.update(
        {profiler._record_function_enter_new.default, profiler._record_function_exit._RecordFunction}
    )


def before_backward(model: Any, layout: Layout, is_last: bool) -> None:
    """Say whether a step's last micro-batch follows: only then are gradients added over copies of the model.

    Below ZeRO 3, weights are gathered once a step.
    """
    if layout.data > 1 and layout.zero > 1:
        model.set_requires_all_reduce(is_last)
        if layout.zero == 2:
            model.set_reshard_after_backward(is_last)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered."""
    stages: Any = getattr(model, "stages", None)
    for part in stages.own if stages else [model]:
        for module in part.modules():
            if hasattr(module, "set_reshard_after_forward"):
                module.reshard()  # type: ignore[operator]


def gathered(model: MoEGPT, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors one after another, on rank 0 those of all stages. All ranks must take them.

    Args:
        tensors: by name, ``local_part`` of parameters or things of their shape, and the parameters.
    """
    stages: Any = getattr(model, "stages", None)
    if stages:
        return stages.collect(tensors)
    return ((name, whole(part, like)) for name, (part, like) in tensors.items())


def whole_copy(model: MoEGPT, is_main: bool) -> MoEGPT | None:
    """Return a model with the whole weights on rank 0, None on the others; all ranks must call it."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = gathered(model, {name: (local_part(tensor), tensor) for name, tensor in tensors.items()})
    if not is_main:
        deque(values, maxlen=0)
        return None
    with torch.random.fork_rng([]):
        found = MoEGPT(model.config, model.make_router).to(model.embedding.weight.device)
    own = found.state_dict()
    for name, value in values:
        own[name].copy_(value)
    return found
