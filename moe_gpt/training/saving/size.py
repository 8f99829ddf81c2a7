"""The size of a checkpoint, before there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from moe_gpt.config import RunConfig
from moe_gpt.files.tensors import TensorSpec, header_of
from moe_gpt.measure.parameters import model_of
from moe_gpt.measure.shapes import shapes_only
from moe_gpt.training.adapters import acting_tensors, let_learn, parts_of_adapted
from moe_gpt.training.optimizer import build_optimizer


class CheckpointBytes(NamedTuple):
    """Sizes of a checkpoint's large files, headers included."""

    model: int
    """model.safetensors"""
    optimizer: int
    """optimizer.safetensors: the state of each parameter"""

    @property
    def total(self) -> int:
        """Both; the rest of a checkpoint is the tokenizer and some kilobytes."""
        return self.model + self.optimizer


def checkpoint_bytes(config: RunConfig) -> CheckpointBytes:
    """Return the size of a checkpoint after a step, exact to the byte."""
    return CheckpointBytes(*map(_file_bytes, checkpoint_specs(config)))


def checkpoint_specs(config: RunConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the tensors of model.safetensors and of optimizer.safetensors, in their order."""
    model = shapes_only(model_of(config))
    let_learn(model, config)
    optimizer = build_optimizer(model, config.optimizer)
    state = [
        TensorSpec(f"{name}.{part}", shape, dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for part, (shape, dtype) in optimizer.state_shapes(parameter).items()
    ]
    return _specs(acting_tensors(model)), [*state, *_specs(parts_of_adapted(model))]


def _specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def _file_bytes(specs: list[TensorSpec]) -> int:
    return len(header_of(specs)) + sum(spec.n_bytes for spec in specs)
