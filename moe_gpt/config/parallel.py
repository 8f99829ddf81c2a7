"""How a run is spread over processes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moe_gpt.config.section import Count, Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How a run is spread over the processes that torchrun starts; a resume may change it (docs/many-devices.md)."""

    data: Literal["auto"] | Count = "auto"
    """Ranks that each take a part of every micro-batch; auto takes all processes."""
    replicate: Count = 1
    """Copies of the sharded model, each on data / replicate ranks (HSDP)."""
    expert: Count = 1
    """Data ranks over which each layer's experts are spread; their tokens are exchanged by all-to-all."""
    tensor: Count = 1
    """Ranks that share each matrix product: heads, the experts' inner dimension and the vocabulary are cut."""
    pipeline: Count = 1
    """Ranks that hold consecutive blocks; micro-batches go from one to the next."""
    zero: Literal[0, 1, 2, 3] = 3
    """What is sharded over data ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """Order of micro-batches: all forward, then all backward (gpipe); in turn (1f1b); 1f1b with two parts a rank."""
    timeout_seconds: Count = 600
    """Longest time that a rank waits for another, at the start and in a step."""
