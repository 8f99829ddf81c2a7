"""Sound files of every kind become the same samples; files that lie about themselves are told, or refused by name."""

from __future__ import annotations

import os
import re
import struct
import time

import numpy as np
import pytest

from moe_gpt.errors import InputError
from moe_gpt.speech.sound import RATE, open_sound, read_sound

soundfile = pytest.importorskip("soundfile")


LIST = b"LIST" + struct.pack("<I", 14) + b"INFOINAM" + struct.pack("<I", 2) + b"a\0"


def beeps(rate: int = RATE, seconds: float = 1.0) -> np.ndarray:
    """Three beeps, at 440, 660 and 880 Hz, of a quarter of a second each, with silence around them."""
    time_ = np.arange(round(rate * seconds)) / rate
    sound = np.zeros_like(time_)
    for number, pitch in enumerate((440, 660, 880)):
        inside = (time_ >= 0.05 + 0.32 * number) & (time_ < 0.30 + 0.32 * number)
        sound[inside] = 0.5 * np.sin(2 * np.pi * pitch * time_[inside])
    return sound


def exact() -> np.ndarray:
    """The beeps as 16 bits hold them."""
    return np.round(beeps() * 32768) / 32768


def wav(path, *, channels=1, rate=RATE, claimed=None, before=b"", after=b"", samples=None, riff=b"RIFF"):
    """A WAV file of 16 bits, written by hand so that its header can say anything."""
    data = (exact() * 32768).astype("<i2").tobytes() if samples is None else samples
    size = len(data) if claimed is None else claimed
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * 2 % 2**32, 2, 16)
    body = b"WAVE" + form + before + struct.pack("<4sI", b"data", size) + data + after
    path.write_bytes(riff + struct.pack("<I", min(len(body), 2**32 - 1)) + body)
    return path


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.wav", {"subtype": "PCM_24"}),
        ("a.wav", {"subtype": "PCM_32"}),
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.wav", {"format": "WAVEX", "subtype": "PCM_16"}),
        ("flac-inside.wav", {"format": "FLAC"}),
        ("wav-inside.flac", {"format": "WAV"}),
        ("a.aiff", {"format": "AIFF", "subtype": "PCM_16"}),
    ],
)
def test_exact_forms_give_the_same_samples(tmp_path, name, form):
    """The contents decide, not the name."""
    soundfile.write(tmp_path / name, exact(), RATE, **form)
    np.testing.assert_allclose(read_sound(tmp_path / name), exact(), atol=1e-6)


@pytest.mark.parametrize(("subtype", "within"), [("PCM_U8", 0.01), ("ULAW", 0.02), ("IMA_ADPCM", 0.1), ("MP3", 0.1)])
def test_coarse_forms_are_near(tmp_path, subtype, within):
    """In the middle of each beep, where their filters have settled."""
    soundfile.write(
        tmp_path / "a",
        exact(),
        RATE,
        **({"format": "MP3"} if subtype == "MP3" else {"format": "WAV", "subtype": subtype}),
    )
    samples, right = read_sound(tmp_path / "a"), exact()
    for start in (1600, 6400, 11520):
        np.testing.assert_allclose(samples[start : start + 2000], right[start : start + 2000], atol=within)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_other_rates_are_converted_by_the_files_own(tmp_path, rate):
    """One second stays one second, and a beep keeps pitch and level; the reference is the beep computed at 16 kHz."""
    soundfile.write(tmp_path / "a.wav", beeps(rate), rate, subtype="FLOAT")
    samples = read_sound(tmp_path / "a.wav")
    assert abs(len(samples) - RATE) <= 1
    for start in (1600, 6720, 11840):
        np.testing.assert_allclose(samples[start : start + 2000], beeps()[start : start + 2000], atol=0.02)


def test_channels_are_averaged_and_cancelling_ones_are_told(tmp_path):
    """A mean of opposite channels is silence, so one of them is taken."""
    left, nothing = exact(), np.zeros(RATE)
    for name, channels, share in (
        ("same", (left, left), 1),
        ("right", (nothing, left), 0.5),
        ("six", (*[nothing] * 5, left), 1 / 6),
    ):
        soundfile.write(tmp_path / f"{name}.wav", np.stack(channels, 1), RATE)
        np.testing.assert_allclose(read_sound(tmp_path / f"{name}.wav"), left * share, atol=1e-4)
    soundfile.write(tmp_path / "opposite.wav", np.stack((left, -left), 1), RATE, subtype="FLOAT")
    sound = open_sound(tmp_path / "opposite.wav")
    assert sound.remarks == ("its channels cancel each other; channel 1 of 2 is taken alone",)
    np.testing.assert_allclose(np.concatenate(list(sound.blocks())), left, atol=1e-6)


def test_too_loud_and_silent_files_are_told(tmp_path):
    """Samples above 1 are scaled, not clipped."""
    soundfile.write(tmp_path / "loud.wav", 4 * exact(), RATE, subtype="FLOAT")
    sound = open_sound(tmp_path / "loud.wav")
    assert sound.remarks == ("its loudest sample is 2, above 1; all are scaled down by it",)
    np.testing.assert_allclose(np.concatenate(list(sound.blocks())), 2 * exact(), atol=1e-6)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    assert open_sound(tmp_path / "silent.wav").is_silent


@pytest.mark.parametrize(
    "header",
    [
        {"claimed": 0xFFFFFFFF},
        {"claimed": 0x7FFFF000},
        {"before": LIST},
        {"before": b"junk" + struct.pack("<I", 3) + b"abc\0"},
        {"after": LIST},
        {"after": b"\0"},
    ],
)
def test_headers_of_pipes_and_editors_lose_nothing_and_add_nothing(tmp_path, header):
    """Sizes that are not known yet, and chunks before and behind the samples."""
    sound = open_sound(wav(tmp_path / "a.wav", **header))
    assert sound.remarks == ()
    assert sound.seconds == 1
    np.testing.assert_allclose(np.concatenate(list(sound.blocks())), exact(), atol=1e-6)


@pytest.mark.parametrize("form", ["AU", "AIFF"])
def test_sizes_that_a_pipe_left_open_claim_nothing(tmp_path, form):
    """Of kinds beside WAV: 4 bytes that are unknown."""
    soundfile.write(tmp_path / "a", exact(), RATE, format=form)
    data = (tmp_path / "a").read_bytes()
    size = 8 if form == "AU" else data.index(b"SSND") + 4
    (tmp_path / "a").write_bytes(
        data[:size] + (b"\xff\xff\xff\xff" if form == "AU" else b"\x7f\xff\xff\xff") + data[size + 4 :]
    )
    assert open_sound(tmp_path / "a").remarks == ()
    np.testing.assert_allclose(read_sound(tmp_path / "a"), exact(), atol=1e-6)


def test_headers_that_lie_are_told(tmp_path):
    """Never shorter without a word, whatever stands before the samples."""
    samples = (exact() * 32768).astype("<i2").tobytes()[:-22]
    for before in (b"", 100 * LIST, b"ds64" + struct.pack("<IQQQI", 28, 0, 32_000, 0, 0)):
        riff, claimed = (b"RF64", 0xFFFFFFFF) if before[:4] == b"ds64" else (b"RIFF", 32_000)
        short = wav(tmp_path / "short.wav", claimed=claimed, samples=samples, before=before, riff=riff)
        assert open_sound(short).remarks == ("ends early: 31,978 of 32,000 bytes",)
    half = wav(tmp_path / "half.wav", claimed=16_000)
    assert open_sound(half).remarks == ("only the 8,000 samples that the header claims are read; 16,000 bytes follow",)


ONLY = "only the 64,000 samples that the header claims are read; 4,000 bytes follow"


@pytest.mark.parametrize(
    ("form", "cut", "longer"),
    [
        ("WAV", "ends early: 76,8.. of 128,000 bytes", ONLY),
        ("WAVEX", "ends early: 76,8.. of 128,000 bytes", ONLY),
        ("RF64", "ends early: 76,8.. of 128,000 bytes", ONLY),
        ("W64", "ends early: 76,9.. of 128,104 bytes", "longer than its header says: 132,104 bytes, not 128,104"),
        ("AIFF", "ends early: 76,8.. of 128,008 bytes", ONLY),
        ("AU", "ends early: 76,8.. of 128,000 bytes", ONLY),
        ("NIST", "ends early: 38,2.. of 64,000 samples", "longer than its header says: 66,000 samples, not 64,000"),
        ("MP3", "ends early: .* of 64,000 samples", None),
        ("OGG", "ends early: its last page is missing", None),
        ("OPUS", "ends early: its last page is missing", None),
        ("FLAC", "it cannot be read as sound .*", None),
        ("CAF", "it cannot be read as sound .*", None),
    ],
)
def test_every_kind_of_file_tells_that_it_was_cut(tmp_path, form, cut, longer):
    """Of a whole file, and of a tag behind the sound, nothing is told; a cut file is told of, or refused."""
    path = tmp_path / "a"
    kind = {"format": "OGG", "subtype": "OPUS"} if form == "OPUS" else {"format": form}
    noise = np.random.default_rng(0).normal(0, 0.01, 4 * RATE)  # so that Ogg needs several pages
    soundfile.write(path, np.tile(exact(), 4) + noise, RATE, **kind)
    whole = path.read_bytes()
    assert open_sound(path).remarks == ()
    path.write_bytes(whole + (b"\1\2" * 2000 if longer else b"TAG" + bytes(125)))
    assert open_sound(path).remarks == ((longer,) if longer else ())
    path.write_bytes(whole[: 60 + len(whole) * 3 // 5])
    try:
        [told] = open_sound(path).remarks
    except InputError as error:
        told = str(error).partition(": ")[2]
    assert re.fullmatch(cut, told)


@pytest.mark.parametrize(
    ("claimed", "remark"), [(8_000, "longer than its header says: 16,000 samples, not 8,000"), (0, None)]
)
@pytest.mark.parametrize("before", [b"", b"ID3\4\0\0\0\0\1\0" + bytes(128)])
def test_all_of_a_flac_file_is_read_whatever_its_header_claims(tmp_path, claimed, remark, before):
    """A pipe leaves the number of samples at 0, and libsndfile cannot seek then; tags may stand before it."""
    path = tmp_path / "a.flac"
    soundfile.write(path, exact(), RATE)
    data, whole = bytearray(path.read_bytes()), read_sound(path)
    data[18:26] = ((int.from_bytes(data[18:26], "big") >> 36 << 36) + claimed).to_bytes(8, "big")
    path.write_bytes(before + data)
    assert open_sound(path).remarks == ((remark,) if remark else ())
    np.testing.assert_array_equal(read_sound(path), whole)


def test_holes_and_second_streams_of_ogg_are_told(tmp_path):
    """Pages that are missing in the middle, and two files one behind the other, of which libsndfile reads one."""
    path = tmp_path / "a.ogg"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 8 * RATE), RATE)
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    assert open_sound(path).remarks == ("only the first of several streams is read",)
    path.write_bytes(whole[: len(whole) // 2] + bytes(6000) + whole[len(whole) // 2 + 6000 :])
    [remark] = open_sound(path).remarks
    assert re.fullmatch(r"ends early: \d+,\d+ of 128,000 samples", remark)


def test_of_an_mp3_file_without_a_length_nothing_is_claimed(tmp_path):
    """Without it, libsndfile guesses one from the first frame, here twice as much as there is."""
    path = tmp_path / "a.mp3"
    noise = np.random.default_rng(0).normal(0, 0.2, RATE)
    soundfile.write(path, np.concatenate((np.zeros(RATE), noise)), RATE, bitrate_mode="VARIABLE")
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], 4) :])
    with soundfile.SoundFile(path) as file:
        assert file.frames > 3 * RATE
    assert open_sound(path).remarks == ()
    assert abs(open_sound(path).seconds - 2) < 0.2


def test_other_kinds_and_huge_files_are_refused(tmp_path):
    """They might be cut, and nobody would know; or they are larger than any recording."""
    soundfile.write(tmp_path / "a.paf", exact(), RATE)
    with pytest.raises(InputError, match=r"a.paf: PAF is not read, as a cut would not be noticed; convert it to WAV"):
        open_sound(tmp_path / "a.paf")
    os.truncate(wav(tmp_path / "a.wav"), 1 << 36)
    with pytest.raises(InputError, match="the file has 68,719,476,736 bytes, more than 34,359,738,368"):
        open_sound(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ({"claimed": 0}, "the header says 0 samples, but 32,000 bytes follow it"),
        ({"channels": 0}, "0 channels; it must be 1 to 64"),
        ({"channels": 2000}, "2,000 channels; it must be 1 to 64"),
        ({"rate": 0}, "0 samples a second; it must be 1,000 to 384,000"),
        ({"rate": 4_000_000_000}, "4,000,000,000 samples a second"),
        ({"samples": b""}, "it has 0 samples, less than 0.1 seconds"),
        ({"samples": b"\1\0" * 1000}, "it has 1,000 samples, less than 0.1 seconds"),
    ],
)
def test_impossible_headers_are_refused(tmp_path, header, cause):
    """With file and field, whatever the header claims."""
    path = wav(tmp_path / "a.wav", **header)
    with pytest.raises(InputError, match="a.wav: .*" + cause):
        open_sound(path)


def test_what_is_no_sound_is_refused(tmp_path):
    """Empty files, text, folders, pipes, numbers that are none, files that are not there."""
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("def f():\n    pass\n" * 100)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(RATE) == 99, np.nan, exact()), RATE, subtype="FLOAT")
    os.mkfifo(tmp_path / "pipe.wav")
    for name, cause in (
        ("empty.wav", "the file is empty"),
        ("text.wav", "cannot be read as sound"),
        ("nan.wav", "infinite or no number"),
        ("pipe.wav", "is no file"),
        (".", "is no file"),
        ("none.wav", "is not there"),
    ):
        with pytest.raises(InputError, match=cause):
            open_sound(tmp_path / name)


def test_long_files_take_the_memory_of_a_minute(tmp_path):
    """Pieces, not the whole: 5 minutes at 48 kHz are 58 MB of float samples."""
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 48_000, 1) as file:
        for _ in range(5):
            file.write(np.zeros(60 * 48_000, np.int16) + np.int16(1000))
    started = time.process_time()
    largest, total = 0, 0
    for block in open_sound(tmp_path / "a.flac").blocks():
        largest, total = max(largest, len(block)), total + len(block)
    assert abs(total - 5 * 60 * RATE) <= 1
    assert largest < 2**20
    assert time.process_time() - started < 60


def test_resampled_edges_stay_within_one(tmp_path):
    """A square wave of full scale overshoots by a fifth."""
    square = np.sign(np.sin(np.arange(44_100) / 20)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", square, 44_100, subtype="FLOAT")
    assert np.abs(read_sound(tmp_path / "a.wav")).max() == 1
