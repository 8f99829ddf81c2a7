"""What a training step asks of a GPU, watched on the meta device with a GPU's paths: it waits for nothing and repeats.

The meta device has shapes and no numbers: whatever needs a number on the host fails there. What it cannot show is the
kernel that CUDA takes for scaled_dot_product_attention: here that is a few elementary operations.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import VARIANTS, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_gpt.config import LossConfig, RunConfig, ScheduleConfig, StageConfig
from moe_gpt.data.batches import split_batch
from moe_gpt.data.stream import Batch
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import TrainState, train_step

aten = torch.ops.aten
REFUSED_ON_CUDA = {
    aten.nll_loss2d_forward, aten.nll_loss2d_backward, aten.put, aten.put_, aten.histc, aten.bincount, aten.median,
    aten.grid_sampler_2d, aten._embedding_bag, aten.scatter_reduce, aten.scatter_reduce_,
}  # fmt: skip
"""Those of torch.use_deterministic_algorithms' list of refused operations that a language model might call."""
REFUSED_FOR_FLOATS = {aten.cumsum, aten.cumsum_, aten.cumprod, aten.logcumsumexp}
NEED_THE_HOST = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero, aten.equal}


class Recorder(TorchDispatchMode):
    """Count the operations that run under it, each with whether it read floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Count and run."""
        reads_floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
        self.operations[operation.overloadpacket, reads_floats] += 1
        return operation(*args, **(kwargs or {}))


class NoOptimizer:
    """The optimizer's place: PyTorch has no fused AdamW without a real device."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.param_groups: list[dict] = [{"params": parameters, "lr": 0.0}]

    def step(self, *_: object) -> None:
        """Leave the weights as they are."""

    def zero_grad(self) -> None:
        """Drop the gradients."""


def operations_of_a_step(bf16: bool, **changes: object) -> Counter:
    """Take one training step of two micro-batches on the meta device, by the paths that CUDA takes."""
    device = torch.device("meta")
    with device:
        model = MoEGPT(tiny_config(**changes))
    if bf16:
        model.bfloat16()
    stage = StageConfig(seq_len=16, batch_tokens=64, until_tokens=6400)
    config = RunConfig(model=model.config, loss=LossConfig(), schedule=ScheduleConfig(stages=(stage,)))
    state = TrainState(model, NoOptimizer(list(model.parameters())))  # type: ignore[arg-type]
    batch = Batch(*np.zeros((2, 4, 16), dtype=np.int64))
    with Recorder() as recorder:
        result = train_step(state, split_batch(batch, 32, device), StepPlan(16, 64, 0.01), config, "fp32")
    assert result.metrics.loss.is_meta
    return recorder.operations


@pytest.mark.parametrize(
    ("variant", "bf16"),
    # elsewhere float32 experts run one segment at a time, and the host learns the segments' ends
    [(name, True) for name in VARIANTS if name != "sizes_that_grouped_mm_refuses"] + [("dense", False)],
)
@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 1.25, "router_noise": 0.5}], ids=str)
def test_training_step_never_waits_for_a_gpu_and_asks_nothing_that_varies(variant, bf16, changes):
    """No number goes to the host, and with ``train.deterministic`` CUDA refuses no operation of the step."""
    operations = operations_of_a_step(bf16, **VARIANTS[variant] | changes)
    assert {name for name, _ in operations} & (REFUSED_ON_CUDA | NEED_THE_HOST) == set()
    assert {name for name, reads_floats in operations if reads_floats} & REFUSED_FOR_FLOATS == set()
    if variant != "dense":
        assert operations[aten._grouped_mm, True] == 2 * 2 * (2 + 4)  # micro-batches, layers, products forward and back


def test_recorder_finds_what_a_step_must_not_do():
    """Reading a number fails on the meta device; a running sum of floats is seen."""
    x = torch.ones(3, device="meta")
    with Recorder() as recorder:
        x.cumsum(0)
    assert {name for name, reads_floats in recorder.operations if reads_floats} & REFUSED_FOR_FLOATS == {aten.cumsum}
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
