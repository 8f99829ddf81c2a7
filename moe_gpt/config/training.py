"""Settings of execution: loss weights, training loop, checkpoints, faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.section import (
    Count,
    CountOrZero,
    Flag,
    NonNegative,
    Positive,
    Problem,
    Section,
    Seed,
    Share,
    regular_expressions,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Weights of the terms that are added to the cross entropy."""

    load_balancing_loss_weight: NonNegative = 0.01
    """Weight of the load-balancing loss, used with model.balance: loss (Switch: 0.01)."""
    router_z_loss_weight: NonNegative = 1e-3
    """Weight of the router z loss (ST-MoE: 1e-3)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How the run is executed and watched."""

    seed: Seed = 0
    """Fixes the initial weights, the order of the data and the noise."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type of the matrix products; auto is bf16 where the device is faster with it. Weights stay fp32."""
    micro_batch_tokens: Count = 16_384
    """Tokens that one forward pass may hold; larger batches accumulate gradients."""
    compile: Flag = False
    """Compile each block with torch.compile. Use this on GPUs: on a CPU in fp32, the loop over experts recompiles."""
    activation_checkpointing: Flag = False
    """Recompute each block in the backward pass to save memory."""
    deterministic: Flag = False
    """Make a GPU repeat results bit for bit. Training is slower, and operations that cannot repeat are errors. A CPU
    always repeats."""
    eval_every_steps: CountOrZero = 0
    """Optimizer steps between evaluations; 0 evaluates at the start and the end only."""
    log_every_steps: Count = 10
    """Optimizer steps between writes of the metrics, which are fetched from the device together."""
    record_every_steps: CountOrZero = 50
    """Optimizer steps between recordings of the routing and of the norms of weights and updates; 0 records none."""
    record_tokens: CountOrZero = 2048
    """Held-out tokens per source whose experts and gradients each evaluation records for reports; 0 records none."""
    sample_tokens: CountOrZero = 48
    """Tokens generated after each source's prompt at every evaluation; 0 generates none."""
    report: Flag = True
    """Write report.html at the end."""
    train_only: tuple[str, ...] | None = None
    """Regular expressions: only parameters whose names match one of them learn, such as ["attention"]; null means
    all."""

    def problems(self) -> Iterator[Problem]:
        """Yield patterns that are no regular expressions."""
        yield from regular_expressions(self, "train_only")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: CountOrZero = 500
    """Optimizer steps between checkpoints; 0 saves at the end only."""
    keep_last: Count = 2
    """Number of newest checkpoints to keep."""
    keep_best: Flag = True
    """Also keep the checkpoint with the lowest mean validation loss of those saved right after an evaluation."""
    keep_every_steps: CountOrZero = 0
    """Also keep checkpoints whose step is a multiple of this; 0 adds none."""
    format: Literal["auto", "gathered", "sharded"] = "auto"
    """gathered: rank 0 writes all tensors. sharded: each rank writes its part. auto: sharded from 50 GB on."""
    in_background: Flag = True
    """Write checkpoints while training continues. Training waits for a write only at the end and at a signal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultConfig(Section):
    """What happens after numerical faults. A step with a non-finite loss or gradient never changes the weights."""

    max_skips_in_a_row: Count = 10
    """Non-finite steps in a row after which the run returns to its last good checkpoint and skips these tokens."""
    max_rollbacks: CountOrZero = 3
    """Number of returns to a checkpoint that are allowed; the next fault stops the run."""
    spike_window: Count = 200
    """The loss is compared with the mean and the standard deviation of this many previous steps."""
    spike_deviations: Positive = 8.0
    """A warning calls the loss a spike if it is this many standard deviations above that mean."""
    routing_window: Count = 200
    """Recent steps over which expert loads are judged; growth is judged over three times as many."""
    dead_expert_load: Share = 0.01
    """A warning calls an expert dead if its load is below this share of an even load."""
    collapsed_share: Share = 0.9
    """A warning says collapse if the top_k busiest experts of a layer get more than this share of all assignments."""
