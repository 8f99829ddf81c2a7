"""How an optimizer keeps its running means between steps: in float32, in bfloat16, or in 8 bits a number.

The 8 bits are those of blocks: each block of 256 numbers has a float32 scale, its largest magnitude (Dettmers et al.,
arXiv 2110.02861). The codes are even in a root of the numbers, which resolves the small ones: in the square root for
means of gradients, which have a sign, and in the fourth root for means of squares, which have none and would divide by
zero if they became zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StateType = Literal["float32", "bfloat16", "int8"]
_BLOCK = 256


def n_blocks(n_numbers: int) -> int:
    """Return how many scales so many numbers have in 8 bits."""
    return -(-n_numbers // _BLOCK)


def kept_type(kind: StateType, is_square: bool) -> torch.dtype:
    """Return the type of what ``pack`` returns."""
    return (torch.uint8 if is_square else torch.int8) if kind == "int8" else getattr(torch, kind)


def pack(values: Tensor, kind: StateType, is_square: bool) -> tuple[Tensor, Tensor | None]:
    """Return float32 numbers in the form in which they are kept, and in 8 bits the scales of their blocks.

    Args:
        values: of any shape, which the result keeps.
        kind: the form.
        is_square: whether these are means of squares, which are not negative.
    """
    if kind != "int8":
        return values.to(kept_type(kind, is_square)), None
    blocks = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.abs().amax(dim=1)
    shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if is_square:  # what is not zero stays so
        codes = (shares.sqrt().sqrt() * 255).round().clamp(min=1).mul_(shares > 0).to(torch.uint8)
    else:
        codes = (shares.abs().sqrt() * 127).round().mul_(shares.sign()).to(torch.int8)
    return codes.flatten()[: values.numel()].view(values.shape), scale


def unpack(kept: Tensor, scale: Tensor | None) -> Tensor:
    """Return the numbers that ``pack`` was given, as far as it kept them, in float32."""
    if scale is None:
        return kept.float()
    shares = kept.float().div_(255 if kept.dtype == torch.uint8 else 127)
    shares = shares.square_().square_() if kept.dtype == torch.uint8 else shares.mul_(shares.abs())
    return shares.mul_(scale.repeat_interleave(_BLOCK)[: kept.numel()].view(kept.shape))
