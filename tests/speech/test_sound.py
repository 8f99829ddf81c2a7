"""Sound files of every kind become the same samples; files that lie about themselves are told, or refused by name."""

from __future__ import annotations

import os
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


def test_headers_that_lie_are_told(tmp_path):
    """Never shorter without a word."""
    short = wav(tmp_path / "short.wav", claimed=32_000, samples=(exact() * 32768).astype("<i2").tobytes()[:-22])
    assert open_sound(short).remarks == ("ends early: 15,989 of 16,000 samples",)
    half = wav(tmp_path / "half.wav", claimed=16_000)
    assert open_sound(half).remarks == (
        "only the 8,000 samples that the header claims are read; some 16,000 are there",
    )
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 4 * RATE), RATE)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:60_000])
    with pytest.raises(InputError, match=r"cut.flac: "):
        open_sound(tmp_path / "cut.flac")


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


def test_an_hour_takes_the_memory_of_a_minute(tmp_path):
    """Pieces, not the whole: 20 minutes at 48 kHz are 230 MB of float samples."""
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 48_000, 1) as file:
        for _ in range(20):
            file.write(np.zeros(60 * 48_000, np.int16) + np.int16(1000))
    started = time.process_time()
    largest, total = 0, 0
    for block in open_sound(tmp_path / "a.flac").blocks():
        largest, total = max(largest, len(block)), total + len(block)
    assert abs(total - 20 * 60 * RATE) <= 1
    assert largest < 2**20
    assert time.process_time() - started < 60


def test_a_flac_header_that_a_pipe_left_open_is_read_to_the_end(tmp_path):
    """Its 36 bits for the number of samples are 0, and libsndfile cannot seek then."""
    path = tmp_path / "a.flac"
    soundfile.write(path, exact(), RATE)
    data, whole = bytearray(path.read_bytes()), read_sound(path)
    data[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    path.write_bytes(data)
    assert open_sound(path).remarks == ()
    np.testing.assert_array_equal(read_sound(path), whole)


def test_compressed_blocks_are_not_counted_as_samples(tmp_path):
    """ADPCM has 505 samples in a block of 256 bytes."""
    path = tmp_path / "a.wav"
    soundfile.write(path, exact(), RATE, subtype="IMA_ADPCM")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    [remark] = open_sound(path).remarks
    assert remark.startswith("ends early: ")
    assert remark.endswith(" compressed blocks")


def test_resampled_edges_stay_within_one(tmp_path):
    """A square wave of full scale overshoots by a fifth."""
    square = np.sign(np.sin(np.arange(44_100) / 20)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", square, 44_100, subtype="FLOAT")
    assert np.abs(read_sound(tmp_path / "a.wav")).max() == 1
