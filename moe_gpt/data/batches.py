"""Batches for the model: tensors on the device, cut into micro-batches, with documents kept apart if asked."""

from __future__ import annotations

from typing import NamedTuple

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
