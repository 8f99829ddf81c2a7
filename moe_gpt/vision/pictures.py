"""Picture files as pixels: upright, in RGB, on a white ground, whatever a phone or a scanner wrote."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
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
from moe_gpt.files.durable import read_digest

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""What is read. Others, such as EPS, would start another program."""
MAX_PIXELS = 50_000_000
_MOST_BYTES = 1 << 29
_MOST_SCANS, _SCAN = 100, b"\xff\xda"
"""Of a progressive JPEG, which has about ten; and the mark of one."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[^;,]*)*;base64,(.*)", re.DOTALL | re.IGNORECASE)
_GROUND = (255, 255, 255)
_BITS, _MEANING, _KIND = 258, 262, 339
"""TIFF's tags for bits of a number, for what 0 means (0: white), and for the kind of numbers (1: unsigned)."""


class Picture(NamedTuple):
    """A picture as the model sees it."""

    pixels: UInt8[Tensor, "3 H W"]
    """Red, green, blue."""
    remarks: tuple[str, ...]
    """What of the file is not, or not quite, in the pixels."""


def open_picture(source: str | Path | bytes, size: int | None = None, max_pixels: int = MAX_PIXELS) -> Picture:
    """Return the pixels of a file.

    A turn in the EXIF data is carried out. Transparent points become white. 16 bits become 8, and numbers without a
    range, such as floats, are scaled from their own least and greatest, or are mid-grey where all are equal. Of an
    animation, the first frame is taken.

    Args:
        source: path of a file, or its bytes.
        size: side of the square that it is fitted into, its shape kept, the rest white; by default it stays as it is.
        max_pixels: more are refused before they are decoded.

    Raises:
        InputError: naming the file and the cause.
    """
    with _opened(source, max_pixels) as image:
        return _read(image, size)


class Checked(NamedTuple):
    """A picture that can be read to its end."""

    digest: str
    """SHA-256 of the file."""
    remarks: tuple[str, ...]


def check_picture(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Checked:
    """Read all of a picture, in less time than ``open_picture`` where its format allows; errors are the same."""
    with _opened(source, max_pixels) as image:
        image.draft(None, (1, 1))
        remarks = _read(image, 1).remarks
    if isinstance(source, bytes):
        return Checked(hashlib.sha256(source).hexdigest(), remarks)
    return Checked(read_digest(Path(source)).sha256, remarks)


def read_data_url(url: str) -> bytes:
    """Return what a data URL holds, whose base64 may be in lines and without =; else raise ``InputError``."""
    found = _DATA_URL.fullmatch(url)
    text = "".join(found[1].split()) if found else "?"
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"it must be data:image/TYPE;base64, and base64 after it, got {shown(url[:60])}") from None


def is_data_url(text: str) -> bool:
    """Return whether a text is meant to hold a picture, and is no path."""
    return text[:5].lower() == "data:"


@contextlib.contextmanager
def _opened(source: str | Path | bytes, max_pixels: int) -> Iterator[PIL.Image.Image]:
    """Open a file and read its header; turn what Pillow raises, here and within the block, into one kind of error."""
    name = "the picture" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        _check_path(Path(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of damaged EXIF data
            with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                n_bytes = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
                _check_size(image, max_pixels, n_bytes)
                yield image
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except PIL.UnidentifiedImageError:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise InputError(f"{name} must be {known}, and is none of them") from None
    except Exception as error:  # Pillow raises whatever half a header leads it to
        cause = str(error).rstrip(".") or type(error).__name__
        raise InputError(f"{name} cannot be read as a picture: {cause}") from None


def _check_path(path: Path) -> None:
    name, cause = str(path), "not there"
    try:
        if path.is_file():
            return
        cause = "no file" if path.exists() else cause
    except (OSError, ValueError):  # too long, or with a zero byte
        cause = "no path"
    if max(map(len, path.parts), default=0) > 100:  # between two slashes
        name, cause = shown(name), f"{cause}; base64 must have data:image/TYPE;base64, before it"
    elif "\\" in name and cause == "not there":
        cause += "; write / for \\"
    raise InputError(f"{name} is {cause}")


def _check_size(image: PIL.Image.Image, max_pixels: int, n_bytes: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(f"it has {width:,} x {height:,} pixels; at most {max_pixels:,} are read")
    if n_bytes > _MOST_BYTES:
        raise InputError(f"the file has {n_bytes:,} bytes; at most {_MOST_BYTES:,} are read")


def _remarks(image: PIL.Image.Image) -> tuple[str, ...]:
    """Return what a header tells; the second picture in a phone's JPEG is none that a person sees."""
    known: dict[str | None, tuple[str, ...]] = {"MPO": (), "TIFF": ("several pages; the first is taken",)}
    found = known.get(image.format, ("animated; the first frame is taken",))
    return found if getattr(image, "is_animated", False) else ()


def _turned(image: PIL.Image.Image) -> tuple[PIL.Image.Image, tuple[str, ...]]:
    """Return a picture upright, with remarks."""
    given, exif = image.info.get("exif", b""), PIL.Image.Exif()
    with contextlib.suppress(Exception):  # as above
        exif.load(given)  # that of a JPEG fails here alone
        if exif or not given:
            return ImageOps.exif_transpose(image), ()
    return image, ("damaged EXIF data; taken as upright",)


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
    remarks = _remarks(image)
    _check_scans(image)
    image.load()
    upright, more = _turned(image)
    rgb = _to_rgb(upright, image)
    if size is not None:
        rgb = ImageOps.pad(rgb, (size, size), color=_GROUND)
    return Picture(torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous(), remarks + more)


def _to_rgb(image: PIL.Image.Image, file: PIL.Image.Image) -> PIL.Image.Image:
    """Return a picture in RGB; the file that it is from knows what its numbers mean."""
    if image.mode.startswith(("I", "F")):
        return PIL.Image.fromarray(_to_bytes(image, file)).convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(part >> 8 for part in clear)
    if "A" in image.getbands() or clear is not None:
        rgba = image.convert("RGBA")
        ground = PIL.Image.new("RGBA", rgba.size, (*_GROUND, 255))
        return PIL.Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _to_bytes(image: PIL.Image.Image, file: PIL.Image.Image) -> np.ndarray:
    """Return grey values of 16 bits, or of any range, as bytes."""
    values, tags = np.asarray(image), getattr(file, "tag_v2", {_KIND: (2,)})
    if (image.mode, tags.get(_KIND, (1,))) == ("I", (1,)):
        values = values.view(np.uint32)
    if image.mode.startswith("I;") or (image.mode, file.format) in (("I", "PPM"), ("I", "PNG")):
        found = _scaled(values, 0, 2.0 ** tags.get(_BITS, (16,))[0] - 1)
        found = 255 - found if tags.get(_MEANING) == 0 else found
        return np.where(values == image.info.get("transparency", -1), np.uint8(255), found)
    return _scaled(values, float(values.min()), float(values.max()))


def _scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Return numbers as bytes."""
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise InputError("it has pixels that are infinite or no number")
    if white == black:  # of one number, nobody knows which grey it is
        return np.full(numbers.shape, 128, np.uint8)
    numbers -= black
    numbers *= 255 / (white - black)
    return np.round(numbers, out=numbers).astype(np.uint8)
