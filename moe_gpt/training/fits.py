"""Whether a run fits into the memory of this machine; checked before anything is built."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_gpt.config import RunConfig
from moe_gpt.errors import InputError
from moe_gpt.measure.memory import needed_memory
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.ops.device import Precision, available_memory_bytes
from moe_gpt.terminal.numbers import format_value

_HOPELESS = 20
"""A model that needs more than this many times the free memory is refused; no setting would make it fit."""


def refuse_full_size(config: RunConfig, device: torch.device) -> None:
    """Raise ``InputError`` if weights, gradients and moments alone are far larger than the free memory."""
    free, counts = available_memory_bytes(device), count_parameters(config.model)
    needed = needed_memory(config, device, "bf16", counts).bytes  # in bf16 without activations
    if free is not None and needed > _HOPELESS * free:
        raise InputError(
            f"this config has {format_value(counts.total, 'parameters')} parameters; training needs at least "
            f"{format_value(needed, 'bytes')} of memory, and {format_value(free, 'bytes')} are free here; train a "
            "smaller config such as tiny.yaml, or see the needs of this one with moe-gpt plan"
        )


def warn_of_memory(config: RunConfig, device: torch.device, precision: Precision, say: Callable[[str], None]) -> None:
    """Warn if a run needs more memory than is free."""
    needed, free = needed_memory(config, device, precision), available_memory_bytes(device)
    if free is not None and needed.bytes > free:
        advice = f"lower train.micro_batch_tokens (now {config.train.micro_batch_tokens:,})"
        if not config.train.activation_checkpointing:
            advice += ", set train.activation_checkpointing=true"
        say(
            f"WARNING: training needs {needed.shown()} of memory, and {format_value(free, 'bytes')} are free; {advice}"
            ", or make the model smaller"
        )
