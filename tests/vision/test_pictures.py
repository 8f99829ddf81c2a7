"""Picture files become the pixels that a person sees, or an error with file and cause."""

from __future__ import annotations

import base64
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from moe_gpt.errors import InputError
from moe_gpt.vision.pictures import check_picture, open_picture, read_data_url

RED, BLUE, GREEN, WHITE = (220, 30, 30), (30, 30, 220), (30, 200, 30), (255, 255, 255)


def flag(left: tuple[int, ...] = RED, right: tuple[int, ...] = BLUE, mode: str = "RGB") -> Image.Image:
    """A picture of 32 x 32 whose halves differ."""
    image = Image.new(mode, (32, 32), left)
    image.paste(right, (16, 0, 32, 32))
    return image


def halves(path) -> list[tuple[int, ...]]:
    """The colours of a point of each half."""
    pixels = open_picture(path).pixels
    assert pixels.dtype == torch.uint8
    return [tuple(pixels[:, 16, x].tolist()) for x in (4, 28)]


def save(image: Image.Image, path, **options: object):
    """Write a picture and return its path."""
    image.save(path, **options)
    return path


def grey16(tmp_path):
    """Grey of 16 bits, of which Pillow alone makes white."""
    values = np.where(np.arange(32) < 16, 10_000, 40_000).astype(np.uint16)
    return save(Image.fromarray(np.tile(values, (32, 1))), tmp_path / "a.png")


def test_every_kind_of_colour_is_the_one_seen(tmp_path):
    """Alpha on white, palettes, one bit, grey of 8 and 16 bits, CMYK."""
    made = tmp_path / "a.png"
    assert halves(save(flag(), made)) == [RED, BLUE]
    assert halves(save(flag((*RED, 255), (0, 0, 0, 128), "RGBA"), made)) == [RED, (127, 127, 127)]
    assert halves(save(flag((*RED, 255), (*RED, 0), "RGBA"), made)) == [RED, WHITE]
    assert halves(save(flag((60, 255), (60, 0), "LA"), made)) == [(60,) * 3, WHITE]
    assert halves(save(flag(60, 200, "L"), made)) == [(60,) * 3, (200,) * 3]
    assert halves(save(flag(255, 0, "L").convert("1"), made)) == [WHITE, (0, 0, 0)]
    palette = flag().quantize(4)
    assert halves(save(palette, made)) == [RED, BLUE]
    clear = palette.getpixel((28, 16))
    assert halves(save(palette, made, transparency=clear)) == [RED, WHITE]
    assert halves(grey16(tmp_path)) == [(39,) * 3, (156,) * 3]
    red, blue = halves(save(flag((255, 0, 0), (0, 0, 255)).convert("CMYK"), tmp_path / "a.jpg", quality=95))
    assert red[0] > 200 > 60 > red[2]
    assert blue[2] > 200 > 60 > blue[0]


def test_floats_are_scaled_from_their_own_range(tmp_path):
    """Neither all black nor all white; numbers that are none are refused."""
    values = np.tile(np.linspace(-2, 3, 32, dtype=np.float32), (32, 1))
    path = save(Image.fromarray(values), tmp_path / "a.tif")
    pixels = open_picture(path).pixels
    assert (pixels[:, 0, 0].tolist(), pixels[:, 0, 31].tolist()) == ([0] * 3, [255] * 3)
    values[3, 3] = np.nan
    with pytest.raises(InputError, match="infinite or no number"):
        open_picture(save(Image.fromarray(values), path))

    assert halves(save(Image.fromarray(np.full((32, 32), 0.5, np.float32)), path)) == [(128,) * 3] * 2
    assert halves(save(Image.fromarray(np.where(STEPS == 10_000, -3e38, 3e38).astype(np.float32)), path)) == BOTH


STEPS, BOTH = np.tile(np.where(np.arange(32) < 16, 10_000, 40_000), (32, 1)), [(0,) * 3, WHITE]


def tiff(kind: str, values: np.ndarray, white_is_zero: bool = False, is_signed: bool = False) -> bytes:
    """A TIFF of 32 x 32 grey numbers of a numpy type, such as >u2; 12 stands for bits without gaps."""
    bits, end = 12 if kind == "12" else 8 * np.dtype(kind).itemsize, kind[0] if kind[0] == ">" else "<"
    packed = b"".join(struct.pack(">I", a << 12 | b)[1:] for a, b in values.reshape(-1, 2)) if bits == 12 else b""
    data = packed or values.astype(kind).tobytes()
    tags = {256: 32, 257: 32, 258: bits, 259: 1, 262: 1 - white_is_zero, 273: 8, 277: 1, 278: 32, 279: len(data)}
    entries = [struct.pack(end + "HHII", tag, 4, 1, value) for tag, value in (tags | {339: 1 + is_signed}).items()]
    directory = struct.pack(end + "H", len(entries)) + b"".join(entries) + bytes(4)
    return {"<": b"II", ">": b"MM"}[end] + struct.pack(end + "HI", 42, 8 + len(data)) + data + directory


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (tiff("<u2", STEPS), (39, 156)),
        (tiff(">u2", STEPS), (39, 156)),
        (tiff("<u2", STEPS, white_is_zero=True), (216, 99)),
        (tiff("<i2", STEPS - 20_000, is_signed=True), (0, 255)),
        (tiff("<u4", STEPS * 65_537), (0, 255)),
        (tiff("<i4", STEPS - 20_000, is_signed=True), (0, 255)),
        (tiff("12", STEPS // 16), (39, 156)),
        (b"P5 32 32 65535\n" + STEPS.astype(">u2").tobytes(), (39, 156)),
        (b"P5 32 32 1023\n" + (STEPS // 64).astype(">u2").tobytes(), (39, 156)),
    ],
)
def test_many_bits_become_eight(content, wanted):
    """Of either order of bytes; own ranges of what has no other, and inverted where 0 is white."""
    assert halves(content) == [(value,) * 3 for value in wanted]


def test_a_colour_of_16_bits_that_is_transparent_is_white():
    """As the one of 8 bits is."""
    for colour_type, values in ((0, STEPS[..., None]), (2, np.stack([STEPS, 0 * STEPS, 0 * STEPS], 2))):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        clear = values[0, -1].astype(">u2").tobytes()
        left, right = halves(png(32, rows, depth=16, colour_type=colour_type, clear=clear))
        assert (left[0], right) == (39, WHITE)


@pytest.mark.parametrize("form", ["png", "jpg"])
@pytest.mark.parametrize("turn", range(10))
def test_turns_of_phones_are_carried_out(tmp_path, turn, form):
    """EXIF orientations 1 to 8; 0 and 9 do not exist and count as upright."""
    upright = Image.new("RGB", (48, 32), RED)
    upright.paste(BLUE, (24, 0, 48, 32))
    upright.paste(GREEN, (0, 0, 12, 12))
    back = {2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}  # how the camera held it
    stored = upright
    for method in back.get(turn, ()):
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = open_picture(save(stored, tmp_path / f"a.{form}", exif=exif, quality=95)).pixels
    assert pixels.shape == (3, 32, 48)
    for (x, y), colour in (((4, 4), GREEN), ((4, 28), RED), ((44, 4), BLUE)):
        assert np.abs(pixels[:, y, x].numpy() - np.array(colour)).max() <= (8 if form == "jpg" else 0)


@pytest.mark.parametrize("exif", [b"\xff" * 8, b"MM", b"II*\0\0\x10\0\0"])
def test_damaged_exif_data_are_said_and_the_picture_is_upright(tmp_path, exif):
    """Of a JPEG, where Pillow hides it, and of a PNG; the last has its tags behind the data's end."""
    for name in ("a.jpg", "a.png"):
        picture = open_picture(save(flag(), tmp_path / name, exif=b"Exif\0\0" + exif))
        assert picture.remarks == ("damaged EXIF data; taken as upright",)
        assert picture.pixels[0, 16, 4] > 200 > 60 > picture.pixels[0, 16, 28]


def test_an_animation_is_its_first_picture_and_says_so(tmp_path):
    """GIF and PNG; the pages of a TIFF do, too, and the second picture in a phone's JPEG does not."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    for name in ("a.gif", "a.png"):
        picture = open_picture(save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:]))
        assert picture.remarks == ("animated; the first frame is taken",)
        assert tuple(picture.pixels[:, 5, 5].tolist()) == RED
    for form, remarks in (("MPO", ()), ("TIFF", ("several pages; the first is taken",))):
        first, *more = (frame.copy() for frame in frames)
        picture = open_picture(save(first, tmp_path / "a", format=form, save_all=True, append_images=more))
        assert picture.remarks == remarks


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_a_cut_file_is_a_picture_or_an_error(tmp_path, name):
    """Wherever it ends, and whatever Pillow raises there."""
    frames = [flag().convert("P"), flag(BLUE, RED).convert("P")]
    whole = save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:]).read_bytes()
    n_refused = 0
    for end in range(0, len(whole), 1 + len(whole) // 300):
        for read in (open_picture, check_picture):
            try:
                read(whole[:end])
            except InputError:
                n_refused += read is open_picture
    assert n_refused > 20


def test_pictures_are_fitted_not_squashed(tmp_path):
    """A strip keeps its shape, and the rest is white; bytes are read as files are."""
    path = save(Image.new("RGB", (100, 50), RED), tmp_path / "a.png")
    pixels = open_picture(path, size=40).pixels
    assert pixels.shape == (3, 40, 40)
    assert [tuple(pixels[:, y, 20].tolist()) for y in (5, 20, 35)] == [WHITE, RED, WHITE]
    assert open_picture(path.read_bytes(), size=40).pixels.equal(pixels)
    assert open_picture(save(Image.new("RGB", (1, 1000), RED), path), size=64).pixels.shape == (3, 64, 64)


def png(side: int, rows: bytes, depth: int = 8, colour_type: int = 2, clear: bytes = b"") -> bytes:
    """A PNG, perhaps with a colour that is transparent."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour_type, 0, 0, 0))
    body = (chunk(b"tRNS", clear) if clear else b"") + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """A PNG whose header claims many pixels, with few bytes."""
    return png(side, bytes(1000))


@pytest.mark.parametrize("side", [7_100, 12_000, 20_000, 2**31 - 1])
def test_bombs_are_refused_before_they_are_decoded(side):
    """By the size in the header, whatever Pillow says to it."""
    with pytest.raises(InputError, match=r"pixels"):
        open_picture(bomb(side))


def test_a_jpeg_of_many_scans_is_refused(tmp_path):
    """Each takes a few bytes and a pass over all pixels: a megabyte of them would take minutes."""
    file = io.BytesIO()
    flag().save(file, "JPEG", progressive=True, quality=95)
    whole = file.getvalue()
    assert open_picture(whole).pixels.shape == (3, 32, 32)
    last = whole[whole.rindex(b"\xff\xc4", 0, whole.rindex(b"\xff\xda")) : -2]  # with its table
    path = tmp_path / "scans.jpg"
    path.write_bytes(whole[:-2] + 100 * last + whole[-2:])
    with pytest.raises(InputError, match=r"scans.jpg: it has more than 100 scans"):
        open_picture(path)


def test_frames_are_not_counted():
    """To know that there is a second one takes no time, however many there are."""
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "GIF")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    began = time.process_time()
    assert open_picture(file.getvalue()[:-1] + 200_000 * frame + b";").remarks
    assert time.process_time() - began < 0.1


def test_what_is_no_picture_is_named(tmp_path):
    """Missing, empty, text, cut, damaged, a folder, a pipe, a format that starts programs."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    content = bytearray(whole.getvalue())
    cases = {"empty.png": b"", "text.png": b"hello\n" * 99, "cut.png": bytes(content[: len(content) // 2])}
    cases["drawing.eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    content[len(content) // 2] ^= 0xFF
    cases["flipped.png"] = bytes(content)
    for name, written in cases.items():
        (tmp_path / name).write_bytes(written)
    os.mkfifo(tmp_path / "pipe.png")
    for name in (*cases, "pipe.png", "missing.png", "."):
        with pytest.raises(InputError) as error:
            open_picture(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("iVBORw0KGgo" * 400, "is no path; base64 must have data:image/TYPE;base64, before it"),
        ("/9j/" + "iVBORw0KGgo" * 20, "is not there; base64 must have data:image"),
        ("no\\a.png", "is not there; write / for \\"),
        ("a\0.png", "is n"),
    ],
)
def test_a_path_that_is_none_says_what_it_may_be(name, cause):
    """Base64 without its beginning, which is shown cut, and a path of Windows."""
    with pytest.raises(InputError) as error:
        open_picture(name)
    assert cause in str(error.value)
    assert len(str(error.value)) < 400


def test_data_urls_are_read_as_others_write_them():
    """With parameters, in capitals, without padding."""
    content = png(32, b"x")
    text = base64.b64encode(content + bytes(-len(content) % 3 + 1)).decode()
    for before in ("data:image/png;base64,", "DATA:image/PNG;Base64,", "data:image/png;charset=utf-8;a=b;base64,"):
        for body in (text, text.rstrip("=")):
            assert read_data_url(before + body).rstrip(b"\0") == content
