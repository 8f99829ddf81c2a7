"""Tensors of which each rank holds a part: FSDP2's sharding, and whole tensors from parts and parts from whole ones.

Everything is a sum: each rank's loss is its part of the whole batch's, so gradients are added and never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt.config import RunConfig
from moe_gpt.distributed.experts import Exchange
from moe_gpt.distributed.layout import Layout, expert_dim
from moe_gpt.distributed.tensor import Cut
from moe_gpt.model.attention import Attention
from moe_gpt.model.experts import Experts
from moe_gpt.model.transformer import MoEGPT

_OTHER_FORWARDS = ("cross_entropy", "next_token_logits", "routings")


class Meshes:
    """The ranks of a layout in rows, one for each kind of parallelism; experts that are spread have their own."""

    def __init__(self, layout: Layout, device_type: str) -> None:
        names = ("replicate", "shard")
        shards = layout.expert_shards

        def mesh(**data_sizes: int) -> DeviceMesh:
            """Return the mesh of all ranks in which the data ranks have these sizes."""
            sizes = {"pipeline": layout.pipeline, **data_sizes, "tensor": layout.tensor}
            ranks = torch.arange(layout.world).view(*sizes.values())
            return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(sizes))

        whole = mesh(replicate=layout.replicate, shard=layout.shards)
        self.tensor, self.pipeline = whole["tensor"], whole["pipeline"]
        self.everything = whole["shard"] if layout.replicate == 1 else whole[names]
        if layout.expert > 1:
            copies = layout.data // layout.expert // shards
            whole = mesh(replicate=copies, shard=shards, expert=layout.expert)
            self.experts, self.shards_of_experts = whole["expert"], whole["shard"] if copies == 1 else whole[names]


def spread_experts(model: MoEGPT, meshes: Meshes) -> None:
    """Leave each rank its share of every layer's experts, and let their tokens be exchanged."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = meshes.experts
    for layer in model.moe_layers():
        experts = layer.experts
        for name, parameter in list(experts.named_parameters()):
            part = _cut(parameter.detach(), mesh, [Shard(0)]).clone()
            spread = DTensor.from_local(
                part, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            setattr(experts, name, nn.Parameter(spread))
        experts.mix = Exchange(mesh, layer.n_experts)  # type: ignore[method-assign, assignment]


def shard(model: MoEGPT, config: RunConfig, layout: Layout, meshes: Meshes) -> None:
    """Shard blocks, attentions that blocks share, spread experts, and the rest, each as one unit of FSDP2."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    dim = expert_dim(config, layout) or 0

    def place(parameter: Tensor) -> Shard | None:
        return Shard(dim) if parameter.dim() == 3 else None

    for module in _units(model, layout):
        is_spread = isinstance(module, Experts)
        fully_shard(
            module,
            mesh=meshes.shards_of_experts if is_spread else meshes.everything,
            reshard_after_forward=layout.zero == 3 and module is not model,
            shard_placement_fn=place,
        )
    for name in _OTHER_FORWARDS:
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply first
            if meshes.everything.device_type == "cpu":
                module.set_custom_reduce_scatter(_ExchangeAndAdd())  # type: ignore[arg-type]


class _ExchangeAndAdd:
    """A reduce-scatter for FSDP2 in half the time of gloo's own, which adds whole tensors (docs/benchmarks.md)."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Send each rank its part of the input, and add what arrives, in the order of ranks."""
        arrived = torch.empty_like(input_tensor)
        dist.all_to_all_single(arrived, input_tensor, group=group)
        torch.sum(arrived.view(dist.get_world_size(group), -1), 0, out=output_tensor)


def _units(model: MoEGPT, layout: Layout) -> list[nn.Module]:
    """Return the modules that are sharded each by itself, inner ones first."""
    inner: list[nn.Module] = [m for m in model.modules() if layout.expert > 1 and isinstance(m, Experts)]
    if model.config.attention_sharing > 1:
        inner += [module for module in model.modules() if isinstance(module, Attention)]
    return [*inner, *model.blocks, model]


def before_backward(model: Any, layout: Layout, is_last: bool) -> None:
    """Say whether a step's last micro-batch follows: only then are its gradients added over copies of the model.

    With ZeRO 0 and 1, which keep whole gradients, they are added over ranks only then, too. Below ZeRO 3, weights are
    gathered once a step.
    """
    if layout.data == 1:
        return
    model.set_requires_all_reduce(is_last)
    if layout.zero < 3:
        model.set_reshard_after_backward(is_last)
    if layout.zero < 2:
        model.set_requires_gradient_sync(is_last)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered."""
    stages: Any = getattr(model, "stages", None)
    for part in stages.own if stages else [model]:
        for module in part.modules():
            if hasattr(module, "set_reshard_after_forward"):
                module.reshard()  # type: ignore[operator]


def cut_of(parameter: Any) -> Cut | None:
    """Return how ranks that share matrix products have cut a parameter."""
    return getattr(parameter, "cut", None)


def is_copy(parameter: Any) -> bool:
    """Whether a parameter is the last stage's copy of a tied matrix, for which the first stage answers."""
    return getattr(parameter, "is_copy", False)


def local_part(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any, like: Any = None) -> Tensor:
    """Return a whole tensor on every rank.

    Args:
        tensor: a sharded tensor, or one that is whole already.
        like: the parameter of which ``tensor`` is this rank's part; its cut and its sharding are undone.
    """
    is_part = hasattr(like, "placements") and not hasattr(tensor, "placements")
    if is_part and tensor.shape == like.to_local().shape:
        from torch.distributed.tensor import DTensor

        mesh, placements = like.device_mesh, like.placements
        shape, stride = like.shape, like.stride()
        tensor = DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    cut = cut_of(like)
    return cut.join(tensor) if cut and tensor.dim() else tensor


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor of which ranks hold parts."""
    shape, cut = list(tensor.shape), cut_of(tensor)
    if cut:
        shape[cut.dim] = cut.length
    return tuple(shape)


def own_part(tensor: Tensor, like: Any) -> Tensor:
    """Return this rank's part of a whole tensor, cut as ``like`` is."""
    cut = cut_of(like)
    if cut:
        tensor = cut.part(tensor)
    return _cut(tensor, like.device_mesh, like.placements) if hasattr(like, "placements") else tensor


def _cut(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    for dim, (start, length) in enumerate(_spans(tensor.shape, mesh, placements)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _spans(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]) -> list[tuple[int, int]]:
    """Return start and length of this rank's part along each dimension."""
    spans = [(0, length) for length in shape]
    for index, placement in enumerate(placements):
        if placement.is_shard():
            start, length = spans[placement.dim]
            size = -(-length // mesh.size(index))
            offset = min(length, size * mesh.get_local_rank(index))
            spans[placement.dim] = start + offset, min(size, length - offset)
    return spans


def pieces_of(tensor: Any, like: Any, is_first: bool) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield this rank's part of a whole tensor in pieces, each with its offsets, unless another rank has the same.

    Args:
        tensor: the part, or something that is not cut though its parameter is, such as a count of steps.
        like: the parameter that says how it is cut.
        is_first: whether this rank answers for what is not cut at all.
    """
    part, mesh, cut = local_part(tensor), getattr(like, "device_mesh", None), cut_of(like)
    if is_copy(like) or _is_anothers(part, like, is_first):
        return
    starts = [start for start, _ in _spans(like.shape, mesh, like.placements)] if mesh else [0] * part.dim()
    if cut and part.dim():
        yield from cut.pieces(part, starts)
    else:
        yield tuple(starts[: part.dim()]), part


def _is_anothers(part: Tensor, like: Any, is_first: bool) -> bool:
    """Whether another rank answers for a part. A count of steps is on every rank that has a part of its parameter."""
    mesh, cut = getattr(like, "device_mesh", None), cut_of(like)
    ranks = mesh.get_coordinate() if mesh else [not is_first]
    if not part.dim():
        return any(ranks) or bool(cut and cut.mesh.get_local_rank())
    if mesh:
        ranks = [rank for rank, place in zip(ranks, like.placements, strict=True) if place.is_replicate()]
    return any(ranks) and not (cut and not mesh)


def on_whole(function: Callable[[Tensor], Tensor], part: Tensor, like: Tensor) -> Tensor:
    """Apply a function to the tensor of which ``part`` is this rank's, and return this rank's part of its result."""
    return own_part(function(whole(part, like)), like)


def square_sum(tensor: Any, parameter: Any) -> Tensor:
    """Return the sum of squares of this rank's part in float32, without what it holds a copy of.

    Args:
        tensor: a parameter, or its gradient or its change.
        parameter: says which part that is.
    """
    pieces = [piece for _, piece in pieces_of(tensor, parameter, is_first=True)]
    squares = [torch.linalg.vector_norm(piece.float()).square() for piece in pieces]
    return sum(squares, local_part(tensor).new_zeros((), dtype=torch.float32))


def gathered(model: MoEGPT, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors one after another, on rank 0 those of all stages. All ranks must take them.

    Args:
        tensors: by name, this rank's parts, and the parameters of which they are parts or have the shape.
    """
    stages: Any = getattr(model, "stages", None)
    counted = {name: pair for name, pair in tensors.items() if not is_copy(pair[1])}
    own = ((name, whole(tensor.detach(), like)) for name, (tensor, like) in counted.items())
    return stages.collect(own) if stages else own


def whole_copy(model: MoEGPT, is_main: bool) -> MoEGPT | None:
    """Return a model with the whole weights on rank 0, None on the others; all ranks must call it."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = None
    if is_main:
        with torch.random.fork_rng([]):
            found = MoEGPT(model.config, model.make_router).to(model.embedding.weight.device)
    own = {} if found is None else {**dict(found.named_parameters()), **dict(found.named_buffers())}
    with torch.no_grad():
        for name, values in gathered(model, {name: (tensor, tensor) for name, tensor in tensors.items()}):
            if own:
                own[name].copy_(values)
    return found
