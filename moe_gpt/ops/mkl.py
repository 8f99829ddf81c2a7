"""MKL for float32 products on a CPU, where the process otherwise prefers oneDNN."""

from __future__ import annotations

import threading

import torch


class _Products:
    """A context in which MKL makes float32 products. Contexts may overlap, in several threads too.

    PyTorch's switch is one for the whole process, so the last one to leave restores it.
    """

    def __init__(self) -> None:
        self._lock, self._n_inside, self._before = threading.Lock(), 0, "highest"

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                torch.set_float32_matmul_precision(self._before)


products = _Products()
