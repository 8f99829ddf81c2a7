"""Pipeline parallelism (GPipe, arXiv 1811.06965): ranks hold consecutive blocks, and micro-batches go through them.

PyTorch's schedules decide what a rank does next. Each of its steps is a whole forward or backward pass of a ``Stage``.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_gpt.config import RunConfig
from moe_gpt.data.batches import MicroBatch
from moe_gpt.distributed.cut import add_over_ranks, joined_shape, local_part, whole
from moe_gpt.distributed.layout import Layout, layers_of_stages
from moe_gpt.distributed.sharding import before_backward
from moe_gpt.distributed.stage import Stage, leave
from moe_gpt.model.losses import RouterStats
from moe_gpt.model.router import Routing
from moe_gpt.model.transformer import ModelOutput, MoEGPT

LossOf = Callable[[MoEGPT, int], Tensor]
"""Returns the loss of the micro-batch of this number; for a stage, its part of that."""
Result = TypeVar("Result")


def cut_into_stages(model: Any, config: RunConfig, layout: Layout, mesh: DeviceMesh) -> list[MoEGPT]:
    """Leave this rank its part of a model, and return the stages that run in its place."""
    model.stages = Stages(model, config, layout, mesh)
    return model.stages.own


def add_gradients(model: Any, micro_batches: Sequence[MicroBatch], loss_of: LossOf, layout: Layout) -> None:
    """Add the gradients of all micro-batches to ``.grad``."""
    if layout.pipeline > 1:
        model.stages.add_gradients(micro_batches, loss_of)
    else:
        for index in range(len(micro_batches)):
            loss = loss_of(model, index)
            before_backward(model, layout, is_last=index == len(micro_batches) - 1)
            loss.backward()
    add_over_ranks(model.parameters())
    if layout.pipeline > 1:
        model.stages.add_gradients_of_tied()


class _Call(nn.Module):
    """A function as a module, without parameters, of which PyTorch's stages would clear the gradients."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


class Stages:
    """The stages that this rank holds, two where they are interleaved, and the way to those of other ranks."""

    def __init__(self, whole: Any, config: RunConfig, layout: Layout, mesh: DeviceMesh) -> None:
        layers = layers_of_stages(config)
        self._whole, self._layout, self._group, self._n = whole, layout, mesh.get_group(), len(layers)
        self._rank, self._size, self._order = mesh.get_local_rank(), mesh.size(), config.parallel.pipeline_schedule
        self._schedule = functools.lru_cache(maxsize=2)(self._new_schedule)  # not more, because it holds buffers
        self._loss_of: LossOf
        self._n_left: dict[int, int] = {}
        self.own = [Stage(whole, number, layers) for number in range(self._rank, self._n, self._size)]
        self._leave_own_parts_in_whole()

    def _leave_own_parts_in_whole(self) -> None:
        """Let the whole model have what the own stages have, and run as all stages one after another."""
        whole, own = self._whole, {layer for stage in self.own for layer in stage.layers}
        for layer in set(range(len(whole.blocks))) - own:
            delattr(whole.blocks, str(layer))
        whole.embedding = self.own[0 if self.own[0].is_first else -1].embedding
        whole.final_norm, whole.output = self.own[-1].final_norm, self.own[-1].output
        whole.forward, whole.routings = self._forward, self._routings

    def add_gradients(self, micro_batches: Sequence[MicroBatch], loss_of: LossOf) -> None:
        """Do what the function of this name does. All micro-batches but the last have the same size."""
        self._loss_of, self._n_left = loss_of, {stage.number: len(micro_batches) for stage in self.own}
        for part in self._of_one_size(micro_batches):
            first, indices = micro_batches[part[0]].inputs, torch.tensor(part)
            try:
                self._schedule(len(part), first.shape, first.device).step(
                    index=indices, target=indices, return_outputs=False
                )
            except RuntimeError as error:
                raise error.__cause__ or error from None  # PyTorch wraps what a stage has raised

    def _of_one_size(self, micro_batches: Sequence[MicroBatch]) -> Iterator[list[int]]:
        """Cut the numbers of micro-batches into parts of one size, on all data ranks alike."""
        rows = [round(len(batch.inputs) / batch.weight) if batch.weight else 0 for batch in micro_batches]
        for _, group in itertools.groupby(range(len(rows)), rows.__getitem__):
            numbers = list(group)
            # interleaved schedules take a multiple of the ranks, or fewer
            cut = len(numbers) - len(numbers) % self._size if self._order == "interleaved" else 0
            yield from filter(None, (numbers[:cut], numbers[cut:]))

    def _new_schedule(self, n: int, shape: tuple[int, int], device: torch.device) -> Any:
        """Return PyTorch's schedule of n micro-batches (B, T)."""
        from torch.distributed import pipelining

        logging.getLogger(pipelining.__name__).setLevel(logging.CRITICAL)  # errors are raised, too
        hidden = torch.empty(*shape, self._whole.config.d_model, device="meta", requires_grad=True)
        stages: list[Any] = [
            pipelining.PipelineStage(
                _Call(functools.partial(self._run, stage)),
                stage.number,
                self._n,
                device,
                input_args=() if stage.is_first else (hidden,),
                output_args=(torch.empty((), device="meta", requires_grad=True) if stage.is_last else hidden,),
                group=self._group,
            )
            for stage in self.own
        ]
        options: dict[str, Any] = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
        if self._order == "interleaved":
            return pipelining.ScheduleInterleaved1F1B(stages, n, **options)
        is_simple = self._order == "gpipe" or n < self._size
        return (pipelining.ScheduleGPipe if is_simple else pipelining.Schedule1F1B)(stages[0], n, **options)

    def _run(self, stage: Stage, *arrived: Tensor, index: Tensor) -> Tensor:
        """Return the hidden states that leave a stage, or the last one's loss."""
        stage.training, stage.arrived = self._whole.training, next(iter(arrived), None)
        loss = self._loss_of(stage, int(index))
        output = loss if stage.is_last else leave(loss, stage)
        output.register_hook(functools.partial(self._before_backward, stage))
        stage.arrived = stage.leaving = None
        return output

    def _before_backward(self, stage: Stage, grad: Tensor) -> None:
        self._n_left[stage.number] -= 1
        before_backward(stage, self._layout, is_last=self._n_left[stage.number] == 0)

    def add_gradients_of_tied(self) -> None:
        """Add the gradients of a tied matrix on the first and the last stage."""
        if not self._whole.config.tie_embeddings or self._rank not in (0, self._size - 1):
            return
        weight = self._whole.embedding.weight
        own, peer = local_part(weight.grad, weight), self._size - 1 - self._rank
        other = torch.empty_like(own)
        both = ((dist.isend, own), (dist.irecv, other))
        for work in dist.batch_isend_irecv([dist.P2POp(do, x, group=self._group, group_peer=peer) for do, x in both]):
            work.wait()
        own += other

    def _pass(self, tokens: Tensor, run: Callable[[Stage], Result]) -> list[Result]:
        """Return what each own stage makes of tokens (B, T), after the stages before it."""
        found = []
        for stage in self.own:
            stage.training = self._whole.training
            if not stage.is_first:
                stage.arrived = torch.empty(*tokens.shape, self._whole.config.d_model, device=tokens.device)
                dist.recv(stage.arrived, group=self._group, group_src=(stage.number - 1) % self._size)
            found.append(run(stage))
            if not stage.is_last:
                dist.send(stage.leaving, group=self._group, group_dst=(stage.number + 1) % self._size)
            stage.arrived = stage.leaving = None
        return found

    def _forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> ModelOutput:
        """Do what ``MoEGPT.forward`` does. Only the last stage has logits, others None."""
        outputs: Any = self._pass(tokens, lambda stage: stage(tokens, document_ids=document_ids))
        logits: Any = outputs[-1].logits if self.own[-1].is_last else None
        stats: Any = [output.router_stats for output in outputs if output.router_stats]
        return ModelOutput(logits, RouterStats(*map(sum, zip(*stats, strict=True))) if stats else None)  # type: ignore[arg-type]

    def _routings(self, tokens: Tensor, document_ids: Tensor | None = None) -> list[Routing]:
        """Do what ``MoEGPT.routings`` does: return those of all stages."""

        def run(stage: Stage) -> dict[int, list[Tensor]]:
            routings = zip(stage.layers, stage.routings(tokens, document_ids), strict=True)
            return {layer: [part.cpu() for part in routing] for layer, routing in routings}

        of_all: list[Any] = [None] * self._size
        dist.all_gather_object(of_all, dict(ChainMap(*self._pass(tokens, run))), group=self._group)
        parts = ChainMap(*of_all)
        return [Routing(*(part.to(tokens.device) for part in parts[layer])) for layer in sorted(parts)]

    def collect(self, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Do what ``gathered`` does: yield own tensors, and on rank 0 those of the other stages, too."""
        copies = ("embedding.",) * (self._rank > 0)  # a tied matrix comes from the first stage
        own = {name: pair for name, pair in tensors.items() if not name.startswith(copies)}
        of_all: list[Any] = [None] * self._size
        described = {name: (joined_shape(*pair), pair[0].dtype) for name, pair in own.items()}
        dist.all_gather_object(of_all, described, group=self._group)
        meets_main = dist.get_rank() % (self._layout.data * self._layout.tensor) == 0
        for name, pair in own.items():
            tensor = whole(*pair)
            if self._rank and meets_main:
                dist.send(tensor.contiguous(), group=self._group, group_dst=0)
            yield name, tensor
        for sender in range(1, self._size * (dist.get_rank() == 0)):
            yield from self._arriving(sender, of_all[sender])

    def _arriving(self, sender: int, described: Mapping[str, tuple]) -> Iterator[tuple[str, Tensor]]:
        for name, (shape, dtype) in described.items():
            tensor = torch.empty(shape, dtype=dtype, device=next(self._whole.parameters()).device)
            dist.recv(tensor, group=self._group, group_src=sender)
            yield name, tensor
