"""Picture files as pixels: upright, in RGB, on a white ground, whatever a phone or a scanner wrote."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from jaxtyping import UInt8
from PIL import ImageOps
from torch import Tensor

from moe_gpt.errors import InputError, shown

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""What is read. Others, such as EPS, would start another program."""
MAX_PIXELS = 50_000_000
_MOST_SCANS, _SCAN = 100, b"\xff\xda"
"""Of a progressive JPEG, which has about ten; and the mark of one."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,(.*)", re.DOTALL)
_GROUND = (255, 255, 255)
_BAD = (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError)
"""What Pillow raises for bytes that are no picture, or half of one."""


class Picture(NamedTuple):
    """A picture as the model sees it."""

    pixels: UInt8[Tensor, "3 H W"]
    """Red, green, blue."""
    remarks: tuple[str, ...]
    """What of the file is not, or not quite, in the pixels."""


def open_picture(source: str | Path | bytes, size: int | None = None, max_pixels: int = MAX_PIXELS) -> Picture:
    """Return the pixels of a file.

    A turn in the EXIF data is carried out. Transparent points become white. 16 bits become 8, and numbers without a
    range, such as floats, are scaled from their own least and greatest. Of an animation, the first picture is taken.

    Args:
        source: path of a file, or its bytes.
        size: side of the square that it is fitted into, its shape kept, the rest white; by default it stays as it is.
        max_pixels: more are refused before they are decoded.

    Raises:
        InputError: naming the file and the cause.
    """
    with _opened(source, max_pixels) as image:
        return _read(image, size)


def check_picture(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, ...]:
    """Return remarks on a picture after reading no more than its header; errors are those of ``open_picture``.

    A file that is damaged behind its header is found by ``open_picture`` alone.
    """
    with _opened(source, max_pixels) as image:
        return _remarks(image)


def read_data_url(url: str) -> bytes:
    """Return what a data URL holds, whose base64 may be in lines; raise ``InputError`` for one of no picture."""
    found = _DATA_URL.fullmatch(url)
    try:
        return base64.b64decode("".join(found[1].split()) if found else "?", validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"it must be data:image/TYPE;base64, and base64 after it, got {shown(url[:60])}") from None


@contextlib.contextmanager
def _opened(source: str | Path | bytes, max_pixels: int) -> Iterator[PIL.Image.Image]:
    """Open a file and read its header; turn what Pillow raises, here and within the block, into one kind of error."""
    name = "the picture" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise InputError(f"{name} is {'no file' if Path(source).exists() else 'not there'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of damaged EXIF data
            with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                _check_size(image, max_pixels)
                yield image
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except PIL.UnidentifiedImageError:
        raise InputError(f"{name} is no picture in {', '.join(FORMATS)}") from None
    except _BAD as error:
        raise InputError(f"{name} cannot be read as a picture: {str(error).rstrip('.')}") from None


def _check_size(image: PIL.Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(f"it has {width:,} x {height:,} pixels; at most {max_pixels:,} are read")


def _remarks(image: PIL.Image.Image) -> tuple[str, ...]:
    return ("it is animated; its first picture is taken",) if getattr(image, "is_animated", False) else ()


def _check_scans(image: PIL.Image.Image) -> None:
    """Refuse a JPEG that refines its pixels in so many scans, of a few bytes each, that decoding takes minutes."""
    file, n_scans, last = getattr(image, "fp", None), 0, b""
    if file is None or image.format not in ("JPEG", "MPO"):
        return
    file.seek(0)
    while n_scans <= _MOST_SCANS and (part := file.read(1 << 20)):
        n_scans += (last + part).count(_SCAN)
        last = part[-1:]
    if n_scans > _MOST_SCANS:
        raise InputError(f"it has more than {_MOST_SCANS} scans, which would take long to decode")


def _read(image: PIL.Image.Image, size: int | None) -> Picture:
    remarks = [*_remarks(image)]
    _check_scans(image)
    image.load()
    try:
        upright = ImageOps.exif_transpose(image)
    except _BAD:
        upright = image
        remarks.append("its EXIF data are damaged; it is taken as upright")
    rgb = _to_rgb(upright)
    if size is not None:
        rgb = ImageOps.pad(rgb, (size, size), color=_GROUND)
    return Picture(torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous(), tuple(remarks))


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith(("I", "F")):
        return PIL.Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = PIL.Image.new("RGBA", rgba.size, (*_GROUND, 255))
        return PIL.Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Return grey values of 16 bits, or of any range, as bytes."""
    if not np.isfinite(values).all():
        raise InputError("it has pixels that are infinite or no number")
    least, most = (0.0, 65535.0) if values.dtype == np.uint16 else (float(values.min()), float(values.max()))
    return np.round((values - least) * (255 / max(most - least, 1e-30))).astype(np.uint8)
