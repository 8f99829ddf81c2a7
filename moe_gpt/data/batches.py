"""Batches for the model: tensors on the device, cut into micro-batches, with documents kept apart if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_gpt.data.stream import Batch
from moe_gpt.ops import IGNORED_TARGET


class MicroBatch(NamedTuple):
    """Inputs and targets on the device, (B, T) each."""

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
    """A number for each position, the same within a document; None if documents are not kept apart."""
    weight: float = 1.0
    """This rank's share of the rows of a micro-batch that several ranks make together."""
    valid_mask: Tensor | None = None
    """False for padding (B, T); None if there is none."""


def keep_documents_apart(inputs: Tensor, targets: Tensor, end_of_text_id: int) -> MicroBatch:
    """Number the documents of each sequence, and ignore targets that belong to the next document."""
    is_end = inputs == end_of_text_id
    document_ids = is_end.cumsum(dim=1) - is_end.long()  # end-of-text is the last token of its document
    return MicroBatch(inputs, targets.masked_fill(is_end, IGNORED_TARGET), document_ids)


def split_batch(
    batch: Batch, micro_batch_tokens: int, device: torch.device, end_of_text_id: int | None = None
) -> list[MicroBatch]:
    """Cut a batch into as few micro-batches as fit under ``micro_batch_tokens``, all full but the last.

    Args:
        micro_batch_tokens: most tokens in one forward pass.
        end_of_text_id: if given, documents are kept apart.
    """
    per_micro = max(1, micro_batch_tokens // batch.inputs.shape[1])
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    micro_batches = [
        MicroBatch(i.to(device, non_blocking=True), t.to(device, non_blocking=True))
        for i, t in zip(inputs.split(per_micro), targets.split(per_micro), strict=True)
    ]
    if end_of_text_id is None:
        return micro_batches
    return [keep_documents_apart(micro.inputs, micro.targets, end_of_text_id) for micro in micro_batches]


ReadRows = Callable[[int, int, int, int], Batch]
"""Returns, of so many rows from a first one on, the part of a rank of so many ranks."""


def deal_batch(
    n_rows: int,
    rows_per_rank: int,
    read: ReadRows,
    device: torch.device,
    end_of_text_id: int | None = None,
    rank: int = 0,
    n_ranks: int = 1,
) -> Iterator[MicroBatch]:
    """Yield a rank's part of each micro-batch of a batch; all ranks get equally many.

    A rank for which no rows are left gets a row without targets and with weight 0, so that it can go along.

    Args:
        n_rows: sequences of the batch.
        rows_per_rank: most sequences of a rank in one forward pass.
        read: reads the batch.
        end_of_text_id: if given, documents are kept apart.
    """
    for first in range(0, n_rows, rows_per_rank * n_ranks):
        n_together = min(rows_per_rank * n_ranks, n_rows - first)
        rows = read(first, n_together, rank, n_ranks)
        weight = len(rows.inputs) / n_together
        if not len(rows.inputs):
            shape = 1, rows.inputs.shape[1]
            is_text = None if rows.is_text is None else np.full(shape, False)
            rows = Batch(np.full(shape, 0), np.full(shape, IGNORED_TARGET), is_text)
        (micro_batch,) = split_batch(rows, rows.inputs.size, device, end_of_text_id)
        valid_mask = None if rows.is_text is None else torch.from_numpy(rows.is_text).to(device, non_blocking=True)
        yield micro_batch._replace(weight=weight, valid_mask=valid_mask)


def part_of(batch: Batch, first: int, n_rows: int, rank: int, n_ranks: int) -> Batch:
    """Return a rank's part of rows of a batch that is in memory: a ``ReadRows`` of the batch."""
    start, end = (first + n_rows * r // n_ranks for r in (rank, rank + 1))
    return Batch(batch.inputs[start:end], batch.targets[start:end])
