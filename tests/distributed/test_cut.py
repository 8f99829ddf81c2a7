"""Numbers of a tensor in a row, in boxes."""

from __future__ import annotations

import pytest
import torch

from moe_gpt.distributed.cut import _boxes


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (4, 3, 5), (2, 1, 3, 2)])
@pytest.mark.parametrize("n_parts", [1, 2, 3, 4])
def test_boxes_fill_the_tensor_once(shape, n_parts):
    """Wherever the part of a rank begins."""
    numbers = torch.arange(torch.Size(shape).numel())
    filled, times, start = torch.zeros(shape, dtype=numbers.dtype), torch.zeros(shape), 0
    for part in numbers.tensor_split(n_parts):
        for offsets, box in _boxes(shape, start, part):
            place = tuple(slice(first, first + n) for first, n in zip(offsets, box.shape, strict=True))
            filled[place] = box
            times[place] += 1
        start += len(part)
    assert torch.equal(filled, numbers.view(shape))
    assert (times == 1).all()
