"""Pictures to rows of features: a small encoder of our own, or any vision model in a folder of transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from moe_gpt.files.transformers_folder import open_parts, refusal

_HEADS = 4
_UNUSED = r"(^|\.)(pooler|head)\."
"""Tensors behind the last hidden states; classifiers are saved without them."""


class SmallEncoder(nn.Module):
    """Four convolutions with group normalisation, positions, and one transformer block; it is trained with the rest.

    Convolutions learn from a few thousand pictures, where a plain vision transformer does not (docs/see-and-hear.md).

    Args:
        size: side of the square pictures in pixels, a multiple of 8.
        width: of a row of features, a multiple of 4.
    """

    def __init__(self, size: int = 64, width: int = 96) -> None:
        super().__init__()
        self.size, self.width = size, width
        channels, strides = (3, width // 4, width // 2, width, width), (2, 2, 2, 1)
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.GroupNorm(4, n_out), nn.GELU())
                for n_in, n_out, stride in zip(channels[:-1], channels[1:], strides, strict=True)
            )
        )
        self.block = _Block(width)
        self.register_buffer("positions", _positions(size // 8, width), persistent=False)

    def forward(self, pictures: UInt8[Tensor, "P 3 size size"]) -> Float[Tensor, "P S Dv"]:
        """Return (size / 8)² rows for each picture, by lines from the upper left."""
        grid = self.convolutions(pictures.float() / 127.5 - 1)
        return self.block(grid.flatten(2).transpose(1, 2) + self.positions)


class _Block(nn.Module):
    """A transformer block. Asked for its weights, torch's attention does not take its fused form, slow on CPUs here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, _HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Float[Tensor, "P S Dv"]) -> Float[Tensor, "P S Dv"]:
        """Return the rows after attention among them, and a feed-forward network."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=True)[0]
        return x + self.feed_forward(self.feed_forward_norm(x))


def _positions(side: int, width: int) -> Float[Tensor, "S Dv"]:
    """Return sinusoids of line and column (arXiv 1706.03762), half of the width for each."""
    frequencies = 100 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    pairs = (line[:, None].expand(side, side, -1), line[None].expand(side, side, -1))
    return torch.cat(pairs, dim=2).flatten(0, 1)


class FolderEncoder(nn.Module):
    """A vision model of transformers with its own processor, such as SigLIP, CLIP or DINOv2. It is frozen.

    Its weights are no part of a model that has it: they stay in their folder, and follow the pictures to their device.

    Args:
        folder: of the model; where it is of pictures and text, its half for pictures is taken.

    Raises:
        InputError: where the folder has no such model.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        *self._held, self.width = _load(Path(folder).absolute())

    @property
    def side(self) -> int | None:
        """The side of the pictures that the processor makes; None where it does not say."""
        size = dict(getattr(self._held[1], "size", None) or {})
        return size.get("height") or size.get("shortest_edge")

    def forward(self, pictures: Sequence[UInt8[Tensor, "3 H W"]]) -> Float[Tensor, "P S Dv"]:
        """Return the last hidden states of pictures of any size, which the processor brings to the model's."""
        model, processor = self._held
        return _last_states(model.to(pictures[0].device), processor, pictures)


@torch.no_grad()
def _last_states(model: Any, processor: Any, pictures: Sequence[UInt8[Tensor, "3 H W"]]) -> Float[Tensor, "P S Dv"]:
    arrays = [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]
    pixels = processor(images=arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return model(pixel_values=pixels.to(model.device, model.dtype)).last_hidden_state


@functools.lru_cache(maxsize=2)
def _load(folder: Path) -> tuple[Any, Any, int]:
    """Return model, processor and width, after a try with a grey picture."""
    what = "a vision model"
    with torch.device("cpu"):  # also where a model of shapes alone is made
        model, processor = open_parts(folder, what, "AutoModel", "AutoImageProcessor", unused=_UNUSED)
        if getattr(processor, "do_center_crop", False):  # which would cut the border off a picture fitted into a square
            processor.size, processor.do_center_crop = processor.crop_size, False
        model = getattr(model, "vision_model", model).requires_grad_(False).eval()
        if getattr(model, "main_input_name", "") != "pixel_values":
            raise refusal(folder, what, "it does not read pixels")
        try:
            shape = _last_states(model, processor, [torch.full((3, 64, 64), 128, dtype=torch.uint8)]).shape
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            raise refusal(folder, what, f"pixels alone give no features ({error})") from None
    if len(shape) != 3 or shape[0] != 1:
        raise refusal(folder, what, f"it gives features of shape {tuple(shape)}, not rows of one width for a picture")
    return model, processor, shape[2]


class Resampler(nn.Module):
    """Any number of rows to a fixed one: learned queries attend to them, as in Flamingo (arXiv 2204.14198, 2.1).

    Args:
        features: width of a row.
        n_rows: number of rows that come out.
        n_layers: of attention among the queries, attention to the rows, and a feed-forward network.
    """

    def __init__(self, features: int, n_rows: int, n_layers: int = 2) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(n_rows, features))
        sizes = (features, _HEADS, 4 * features, 0.0, F.gelu)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(*sizes, batch_first=True, norm_first=True) for _ in range(n_layers)
        )

    def forward(self, features: Float[Tensor, "P S Dv"]) -> Float[Tensor, "P R Dv"]:
        """Return ``n_rows`` rows for each picture."""
        rows = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            rows = layer(rows, features)
        return rows
