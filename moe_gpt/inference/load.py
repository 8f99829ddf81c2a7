"""How many tokens each expert got, counted when somebody asks: counting takes a tenth of the time of a token."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

_PASSES_AT_ONCE = 256


class ExpertLoad:
    """Assignments of tokens to experts, from pass to pass. Any thread may ask."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._counts = torch.zeros(n_layers, n_experts, dtype=torch.long)
        self._pending: list[Sequence[Tensor]] = []
        self._last: Sequence[Tensor] = ()
        self._lock = threading.Lock()

    def add(self, indices: Sequence[Int[Tensor, "N K"]]) -> None:
        """Take in a pass: the experts of its tokens, for each layer that has some."""
        with self._lock:
            self._last = indices
            self._pending.append(indices)
        if len(self._pending) >= _PASSES_AT_ONCE:
            self.counts()

    def counts(self) -> Int[Tensor, "L E"]:
        """Return the assignments since the start."""
        with self._lock:
            pending, self._pending = self._pending, []
            for layer, counts in enumerate(self._counts):
                indices = [of_pass[layer].flatten() for of_pass in pending]
                if indices:
                    counts += torch.bincount(torch.cat(indices).cpu(), minlength=len(counts))
            return self._counts.clone()

    def touched(self) -> float:
        """Return the experts of a layer that the last pass read, in the mean over layers; 0 for a dense model."""
        numbers = [len(indices.unique()) for indices in self._last]
        return sum(numbers) / max(len(numbers), 1)
