"""Whether a run fits this machine, said before anything is built."""

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
"""Times the free memory; what takes more is no run of this machine, whatever its settings."""


def refuse_full_size(config: RunConfig, device: torch.device) -> None:
    """Refuse a model whose weights, gradients and moments alone are far beyond this machine: it is meant for a plan.

    Raises:
        InputError: with the size, and what it is for.
    """
    free, counts = available_memory_bytes(device), count_parameters(config.model)
    needed = 16 * counts.total
    if free is not None and needed > _HOPELESS * free:
        raise InputError(
            f"this config has {format_value(counts.total, 'parameters')} parameters: to train it takes at least "
            f"{format_value(needed, 'bytes')} of memory, and {format_value(free, 'bytes')} are free here; it is meant "
            "for moe-gpt plan, which says what such a run takes; to train, take a smaller one such as tiny.yaml"
        )


def warn_of_memory(config: RunConfig, device: torch.device, precision: Precision, say: Callable[[str], None]) -> None:
    """Say, before anything is built, where a run will not fit."""
    needed, free = needed_memory(config, device, precision), available_memory_bytes(device)
    if free is not None and needed.bytes > free:
        advice = f"lower train.micro_batch_tokens (now {config.train.micro_batch_tokens:,})"
        if not config.train.activation_checkpointing:
            advice += ", set train.activation_checkpointing=true"
        say(
            f"WARNING: training takes {needed.shown()} of memory, and {format_value(free, 'bytes')} are free; {advice}"
            ", or make the model smaller"
        )
