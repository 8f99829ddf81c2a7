"""What a rank holds of whole tensors, and whole tensors from the parts of all ranks.

Everything is a sum: each rank's loss is its part of the whole batch's, so gradients are added and never averaged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

Piece = tuple[tuple[int, ...], Tensor]
"""A part of a tensor, after its offsets along each dimension."""


def of_all_ranks(tensor: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """Return what all ranks of a mesh (n,) have, each a tensor of the same shape."""
    found = [torch.empty_like(tensor) for _ in range(mesh.size())]
    dist.all_gather(found, tensor, mesh.get_group())
    return found


def add_others(own: Tensor, parts: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Add what other ranks have for this one, in their order, and send each its part of ``parts``.

    With gloo, in a third of the time of its reduce-scatter, which adds whole tensors (docs/benchmarks.md).
    """
    arrived: list[Tensor] = []
    works: list[Any] = []
    for rank, part in enumerate(parts):
        if rank != dist.get_rank(group):
            arrived.append(torch.empty_like(own))
            works.append(dist.isend(part, group=group, group_dst=rank))
            works.append(dist.irecv(arrived[-1], group=group, group_src=rank))
    for work in works:
        work.wait()
    for numbers in arrived:
        own += numbers


class Segment(NamedTuple):
    """Consecutive rows: each rank of a mesh holds a share of them, or all do."""

    length: int
    is_cut: bool = True


class Cut(NamedTuple):
    """What of a tensor each rank of a mesh (n,) holds: ceil(length / n) rows of each segment, the last ranks fewer."""

    mesh: DeviceMesh
    dim: int
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Rows of the whole tensor."""
        return sum(segment.length for segment in self.segments)

    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's part, which shares the tensor's memory if there is one segment."""
        parts = [tensor.narrow(self.dim, *span) for span in self.spans(self.mesh.get_local_rank())]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def join(self, part: Tensor) -> Tensor:
        """Return the whole tensor, on every rank, from the parts of all."""
        shape, longest = list(part.shape), sum(n for _, n in self.spans(0))
        shape[self.dim] = longest - part.shape[self.dim]
        padded = torch.cat([part, part.new_empty(shape)], self.dim)
        shape[self.dim] = self.length
        whole = part.new_empty(shape)
        for rank, held in enumerate(of_all_ranks(padded, self.mesh)):
            spans = self.spans(rank)
            own = held.narrow(self.dim, 0, sum(n for _, n in spans)).split([n for _, n in spans], self.dim)
            for span, piece in zip(spans, own, strict=True):
                whole.narrow(self.dim, *span).copy_(piece)
        return whole

    def pieces(self, offsets: Sequence[int], part: Tensor) -> Iterator[Piece]:
        """Yield what this rank answers for of a part of what it holds, by segments, with offsets in the whole."""
        rank, dim, held = self.mesh.get_local_rank(), self.dim, 0
        for segment, (start, length) in zip(self.segments, self.spans(rank), strict=True):
            first = max(held, offsets[dim])
            n = min(held + length, offsets[dim] + part.shape[dim]) - first
            if n > 0 and (segment.is_cut or rank == 0):
                place = (*offsets[:dim], start + first - held, *offsets[dim + 1 :])
                yield place, part.narrow(dim, first - offsets[dim], n)
            held += length

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """Return start and length of what a rank holds of each segment."""
        ends = itertools.accumulate((segment.length for segment in self.segments), initial=0)
        return [
            _span(start, length, self.mesh.size(), rank) if is_cut else (start, length)
            for start, (length, is_cut) in zip(ends, self.segments, strict=False)
        ]


def _span(start: int, length: int, n: int, rank: int) -> tuple[int, int]:
    size = -(-length // n)
    offset = min(length, size * rank)
    return start + offset, min(size, length - offset)


class Flat(NamedTuple):
    """A tensor's numbers in a row, ceil(numel / n) for each rank of a mesh (n,), the last ranks fewer."""

    mesh: DeviceMesh
    shape: tuple[int, ...]

    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's numbers, which share the memory of the contiguous tensor."""
        return self.parts(tensor)[self.mesh.get_local_rank()]

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """Return the numbers of each rank."""
        n, rows = self.mesh.size(), tensor.view(-1)
        return [rows.narrow(0, *_span(0, len(rows), n, rank)) for rank in range(n)]

    def join(self, part: Tensor) -> Tensor:
        """Return the whole tensor, on every rank, from the numbers of all."""
        return Cut(self.mesh, 0, (Segment(math.prod(self.shape)),)).join(part).view(self.shape)

    def pieces(self, offsets: Sequence[int], part: Tensor) -> Iterator[Piece]:
        """Yield this rank's numbers in boxes, with offsets in the whole tensor."""
        n, rank = self.mesh.size(), self.mesh.get_local_rank()
        return _boxes(self.shape, offsets[0] + _span(0, math.prod(self.shape), n, rank)[0], part)

    def add(self, tensor: Tensor) -> None:
        """Replace this rank's numbers by the sums over all ranks, in place."""
        parts, own, group = self.parts(tensor), self.part(tensor), self.mesh.get_group()
        if tensor.is_cpu:
            add_others(own, parts, group)
        else:
            dist.reduce_scatter(own, parts, group=group)

    def gather(self, tensor: Tensor) -> None:
        """Take over the numbers of all other ranks, in place. On a CPU in half the time of gloo's all-gather."""
        parts, group = self.parts(tensor), self.mesh.get_group()
        if not tensor.is_cpu:
            dist.all_gather(parts, self.part(tensor), group)
            return
        for rank, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=rank)


def _boxes(shape: Sequence[int], start: int, numbers: Tensor) -> Iterator[Piece]:
    """Cut consecutive numbers of a tensor of this shape, from ``start`` on, into boxes."""
    size = math.prod(shape[1:])
    while len(numbers):
        row, inside = divmod(start, size)
        if inside or len(numbers) < size:  # a part of a row
            n = min(size - inside, len(numbers))
            for offsets, box in _boxes(shape[1:], inside, numbers[:n]):
                yield (row, *offsets), box[None]
        else:
            n = len(numbers) - len(numbers) % size
            yield (row, *[0] * (len(shape) - 1)), numbers[:n].view(-1, *shape[1:])
        start, numbers = start + n, numbers[n:]


def keep_parts(model: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Replace those parameters that are cut by this rank's parts, in place; those that are one stay one."""
    parts: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in cuts:
            owner, _, last = name.rpartition(".")
            part = nn.Parameter(cuts[name].part(parameter.detach()).clone())
            setattr(model.get_submodule(owner), last, parts.setdefault(id(parameter), part))


class Holding(NamedTuple):
    """What a rank holds of a parameter or buffer; the attribute ``holding`` of those of a model of several ranks."""

    shape: tuple[int, ...]
    """Of the whole."""
    cuts: tuple[Cut, ...] = ()
    """How it was cut, one after another."""
    moves: Flat | None = None
    """What of it this rank's optimizer moves, if ranks hold more than that (ZeRO 1)."""
    copies: DeviceMesh | None = None
    """The data ranks that hold the same, whose gradients are added here and not by FSDP2."""
    is_mine: bool = True
    """Whether this rank answers for it, of those that hold the same."""

    def add(self, gradient: Any) -> Any:
        """Begin to add all data ranks' gradients, of what this rank moves, and return what to wait for, if anything."""
        if self.moves:
            self.moves.add(gradient)
            gradient = self.moves.part(gradient)
        return self.copies and dist.all_reduce(gradient, group=self.copies.get_group(), async_op=True)


def _holding(like: Tensor) -> Holding:
    return getattr(like, "holding", None) or Holding(tuple(like.shape))


def _cuts(like: Tensor) -> list[Cut | Flat]:
    """Return how the whole tensor becomes what this rank's optimizer moves."""
    holding = _holding(like)
    return [*holding.cuts, *filter(None, [holding.moves])]


def local_part(tensor: Any, like: Any = None) -> Tensor:
    """Return what this rank's optimizer moves of a parameter, or of something of the shape of one, in its memory."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    moves = _holding(tensor if like is None else like).moves
    return moves.part(tensor) if moves else tensor


def whole_shape(like: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter."""
    return _holding(like).shape


def joined_shape(part: Tensor, like: Tensor) -> tuple[int, ...]:
    """Return the shape of what ``whole`` returns."""
    return whole_shape(like) if part.dim() and _cuts(like) else tuple(part.shape)


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor what this rank's optimizer moves of ``like``."""
    for cut in _cuts(like):
        tensor = cut.part(tensor.contiguous())
    return tensor


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor on every rank, from ``local_part`` of ``like`` or a tensor of its shape, or a number."""
    part = part.detach()
    for cut in reversed(_cuts(like) if part.dim() else []):
        part = cut.join(part)
    return part


def on_whole(function: Callable[[Tensor], Tensor], part: Tensor, like: Tensor) -> Tensor:
    """Apply a function to the tensor of which ``part`` is this rank's, and return this rank's part of its result."""
    return own_part(function(whole(part, like)), like)


def pieces_of(part: Tensor, like: Tensor) -> list[Piece]:
    """Return the argument of ``whole`` in pieces of the whole tensor, without what another rank answers for."""
    cuts, is_mine = _cuts(like), _holding(like).is_mine
    if not part.dim():
        is_mine = is_mine and not any(cut.mesh.get_local_rank() for cut in cuts)
        cuts = []
    pieces: list[Piece] = [((0,) * part.dim(), part)] * is_mine
    for cut in reversed(cuts):
        pieces = list(itertools.chain.from_iterable(itertools.starmap(cut.pieces, pieces)))
    return pieces


def square_sum(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the sum of squares of what this rank answers for of something of a parameter's shape, in float32."""
    part = local_part(tensor, like)
    squares = [torch.linalg.vector_norm(piece.float()).square() for _, piece in pieces_of(part, like)]
    return sum(squares, part.new_zeros((), dtype=torch.float32))


def add_over_ranks(parameters: Iterable[Tensor]) -> None:
    """Add the gradients of all data ranks, of each parameter what this rank moves; FSDP2 has done so itself."""
    works = [_holding(parameter).add(parameter.grad) for parameter in parameters if parameter.grad is not None]
    for work in filter(None, works):
        work.wait()


def gather_moved(parameters: Iterable[Tensor]) -> None:
    """Take over what the optimizers of other ranks have moved."""
    for parameter in parameters:
        moves = _holding(parameter).moves
        if moves:
            moves.gather(parameter.detach())
