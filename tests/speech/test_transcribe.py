"""Sound files to rows: what is written, what a second call does, and what a folder of a model must be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_whisper import save_tiny_whisper

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.transcribe import TranscribeOptions, source_of, transcribe
from moe_gpt.config.data import SourceConfig
from moe_gpt.data.corpus import iterate_documents
from moe_gpt.errors import InputError
from moe_gpt.speech.recogniser import Heard, Recogniser
from moe_gpt.speech.sound import RATE, read_sound
from moe_gpt.speech.transcribe import Transcript, find_sounds, open_transcript, transcribe_files

KNOCK, GAP = RATE // 20, RATE // 2


def knocks(path: Path, n: int, rng: np.random.Generator) -> Path:
    """A file of n knocks, a twentieth of a second each, with pauses of half a second or more."""
    parts = [np.zeros(GAP)]
    for _ in range(n):
        parts += [rng.normal(0, 0.2, KNOCK).clip(-1, 1), np.zeros(GAP + rng.integers(0, GAP))]
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.concatenate(parts), RATE)
    return path


class Counter:
    """Hears knocks: it says ``knock`` for each stretch of sound."""

    window_seconds = 4.0

    def __init__(self, is_whole: bool = True) -> None:
        self.is_whole, self.n_windows = is_whole, 0

    def __call__(self, windows: list[np.ndarray]) -> list[Heard]:
        """Return a word for every start of a sound."""
        self.n_windows += len(windows)
        assert all(len(window) <= self.window_seconds * RATE for window in windows)
        return [Heard(" ".join(["knock"] * self._count(window)), self.is_whole) for window in windows]

    @staticmethod
    def _count(window: np.ndarray) -> int:
        loud = np.abs(window).reshape(-1) > 1e-3
        steps = np.pad(np.convolve(loud, np.ones(RATE // 10), "same") > 0.5, 1)
        return int((steps[1:] & ~steps[:-1]).sum())


def call(paths, transcript, hears=None):
    """Transcribe and return the last outcome and all warnings."""
    warnings: list[str] = []
    outcome = transcribe_files(paths, hears or Counter(), transcript, warnings.append)
    return outcome, warnings


def rows(path: Path) -> list[dict]:
    """The rows of a transcript."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_word_of_a_long_file_is_written_once(tmp_path):
    """A hundred knocks over some twenty windows."""
    rng, hears = np.random.default_rng(0), Counter()
    outcome, warnings = call([knocks(tmp_path / "a.wav", 100, rng)], Transcript(tmp_path / "t.jsonl", "m"), hears)
    [row] = rows(tmp_path / "t.jsonl")
    assert outcome.done == 1
    assert not warnings
    assert hears.n_windows > 15
    assert row["text"] == " ".join(["knock"] * 100)
    assert set(row) == {"text", "audio", "seconds", "sha256", "model", "model_sha256", "language"}


def test_a_second_call_does_only_what_is_left(tmp_path):
    """Also after a kill in the middle of a line; a changed file is heard again, in its old place."""
    rng, out = np.random.default_rng(1), tmp_path / "t.jsonl"
    paths = [knocks(tmp_path / f"{name}.wav", 1 + name, rng) for name in range(3)]
    call(paths[:2], Transcript(out, "m"))
    whole = out.read_bytes()
    out.write_bytes(whole[:-30])
    outcome, _ = call(paths, Transcript(out, "m"))
    assert (outcome.done, outcome.kept) == (2, 1)
    assert out.read_bytes().startswith(whole)
    knocks(paths[0], 5, rng)
    outcome, _ = call(paths, Transcript(out, "m"))
    assert (outcome.done, outcome.kept) == (1, 2)
    assert [row["text"].count("knock") for row in rows(out)] == [5, 2, 3]


def test_a_transcript_of_something_else_is_not_touched(tmp_path):
    """Rows of other programs, and of another model."""
    out = tmp_path / "t.jsonl"
    for text in ('{"text": "mine"}\n', "my notes\n", "my notes", '{"text": "mine"', '{"text": "a\n{"text": "b', "\n\n"):
        out.write_text(text)
        if text != '{"text": "mine"':  # this one may be the start of a row
            with pytest.raises(InputError, match="lines that transcribe did not write; give another --out"):
                Transcript(out, "m")
            assert out.read_text() == text
    out.unlink()
    call([knocks(tmp_path / "a.wav", 1, np.random.default_rng(0))], Transcript(out, "m"))
    with pytest.raises(InputError, match="was written with the model m, not n"):
        Transcript(out, "n")


@pytest.mark.parametrize(
    ("maker", "text"),
    [
        (("m", "1", "en"), "was written with the model_sha256 0, not 1; give another --out"),
        (("m", "0", None), "was written with the language en, not None; give another --out"),
    ],
)
def test_other_weights_and_another_language_are_another_model(tmp_path, maker, text):
    """A folder that was trained again has the name that it had."""
    out = tmp_path / "t.jsonl"
    call([knocks(tmp_path / "a.wav", 1, np.random.default_rng(0))], Transcript(out, "m", "0", "en"))
    assert Transcript(out, "m", "0", "en").rows
    with pytest.raises(InputError, match=text):
        Transcript(out, *maker)


def test_files_of_one_name_in_two_folders_are_two_rows(tmp_path, monkeypatch):
    """However their paths are spelled; one file under two spellings is one row."""
    out = tmp_path / "t.jsonl"
    for number, day in enumerate(("day1", "day2"), 1):
        knocks(tmp_path / day / "a.wav", number, np.random.default_rng(number))
        monkeypatch.chdir(tmp_path / day)
        call([Path("a.wav")], Transcript(out, "m"))
    outcome, _ = call([Path("../day1/a.wav"), tmp_path / "day2" / "a.wav"], Transcript(out, "m"))
    assert (outcome.done, outcome.kept) == (0, 2)
    assert [row["text"].count("knock") for row in rows(out)] == [1, 2]


def test_a_name_that_is_no_text_is_escaped(tmp_path):
    """As old Macs and Windows wrote them; the other files go on."""
    good, bad = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9.wav", b"bad\xe9.wav"))
    knocks(tmp_path / "a.wav", 1, np.random.default_rng(0)).rename(good)
    bad.write_text("no sound")
    outcome, warnings = call([bad, good], Transcript(tmp_path / "t.jsonl", "m"))
    assert outcome.done == 1
    assert r"bad\udce9.wav" in " ".join(warnings)
    assert rows(tmp_path / "t.jsonl")[0]["audio"].endswith(r"caf\udce9.wav")


def test_what_a_folder_has_beside_sound_is_said(tmp_path):
    """A phone's memos are not passed over without a word."""
    knocks(tmp_path / "a.wav", 1, np.random.default_rng(0))
    for name in ("b.m4a", "c.m4a", "notes.txt"):
        (tmp_path / name).touch()
    said: list[str] = []
    assert [path.name for path in find_sounds([tmp_path], said.append)] == ["a.wav"]
    assert "2 .m4a, 1 .txt" in said[0]


def test_two_processes_do_not_write_one_transcript(tmp_path):
    """The second one is refused, and the first one goes on."""
    with open_transcript(tmp_path / "new" / "t.jsonl", "m") as transcript:
        with (
            pytest.raises(InputError, match="another process is writing"),
            open_transcript(tmp_path / "new" / "t.jsonl", "m"),
        ):
            pass
        call([knocks(tmp_path / "a.wav", 1, np.random.default_rng(0))], transcript)
    with open_transcript(tmp_path / "new" / "t.jsonl", "m") as transcript:
        assert len(transcript.rows) == 1


def test_bad_files_are_named_and_passed_over(tmp_path):
    """And what a file or its text may lack is said."""
    rng = np.random.default_rng(2)
    good, bad = knocks(tmp_path / "a.wav", 2, rng), tmp_path / "b.wav"
    bad.write_text("no sound")
    outcome, warnings = call([bad, good], Transcript(tmp_path / "t.jsonl", "m"), Counter(is_whole=False))
    assert outcome.done == 1
    assert "b.wav" in outcome.failed[0]
    assert "b.wav: it cannot be read as sound" in warnings[0]
    assert "a.wav: at 0.0 s the model reached its limit of tokens" in warnings[1]
    soundfile.write(tmp_path / "noise.wav", rng.normal(0, 0.1, 6 * RATE), RATE)
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE), RATE)
    hears = Counter()
    _, warnings = call([tmp_path / "noise.wav", tmp_path / "silence.wav"], Transcript(tmp_path / "u.jsonl", "m"), hears)
    assert "there is no pause before" in warnings[0]
    assert warnings[1].endswith("silence.wav: it is silent")
    assert rows(tmp_path / "u.jsonl")[1]["text"] == ""


def test_folders_are_searched_for_sound(tmp_path):
    """In the order of names, each file once, other files left out."""
    rng = np.random.default_rng(3)
    paths = [knocks(tmp_path / "in" / name, 1, rng) for name in ("b.wav", "sub/a.WAV")]
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert find_sounds([tmp_path / "in", paths[0], tmp_path / "in" / ".." / "in" / "b.wav"]) == paths
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none has no sound files"):
        find_sounds([tmp_path / "none"])
    with pytest.raises(InputError, match="nowhere is not there"):
        find_sounds([tmp_path / "nowhere"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of a tiny Whisper."""
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper"))


def test_a_model_writes_its_likeliest_tokens(model, tmp_path):
    """Token by token by hand; its window is the extractor's, and a window's text does not depend on the others."""
    hears = Recogniser(model)
    assert hears.window_seconds == 2
    sounds = [read_sound(knocks(tmp_path / f"{n}.wav", n, np.random.default_rng(n))) for n in (1, 2)]
    together = hears(sounds)
    assert [hears([sound])[0] for sound in sounds] == together
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(model).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(model)
    features = extractor(sounds[0], sampling_rate=RATE, return_tensors="pt")["input_features"]
    ids = torch.tensor([[1]])
    while ids.shape[1] < 16 and ids[0, -1] != 0:
        with torch.no_grad():
            logits = whisper(input_features=features, decoder_input_ids=ids).logits
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), 1)
    letters = "  abcdefghijklmnopqrstuvwxyz "
    assert together[0] == Heard("".join(letters[token] for token in ids[0, 1:] if token > 1).strip(), 0 in ids[0, 1:])


def test_a_text_that_ended_is_whole(model, tmp_path):
    """Whisper takes the end off what it returns; a model that can only end still said all it had."""
    hears, sound = Recogniser(model), read_sound(knocks(tmp_path / "a.wav", 1, np.random.default_rng(0)))
    hears._model.generation_config.suppress_tokens = list(range(1, 29))
    assert hears([sound, sound]) == [Heard("", True)] * 2


@pytest.mark.slow
def test_folders_that_are_no_such_model_are_refused(model, tmp_path):
    """Without a config, of another kind, of another rate; and a language where there is one only."""
    for change, cause in (
        (None, "has no config.json"),
        ({"model_type": "llama"}, r"\(model_type llama\) is not loaded as a model from speech to text"),
    ):
        folder = tmp_path / str(len(cause))
        folder.mkdir()
        if change:
            (folder / "config.json").write_text(json.dumps(change))
        with pytest.raises(InputError, match=cause):
            Recogniser(folder)
    with pytest.raises(InputError, match="takes 8,000 samples a second"):
        Recogniser(save_tiny_whisper(tmp_path / "slow", sampling_rate=8000))
    with pytest.raises(InputError, match="leave out --language"):
        Recogniser(model, language="en")
    with pytest.raises(InputError, match="does not know the language English; it knows de, en"):
        Recogniser(save_tiny_whisper(tmp_path / "two", ("en", "de")), language="English")


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model's folder with other tensors."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_hear_in_single(model, tmp_path, dtype):
    """The library keeps the dtype of the files, and features are float32."""
    folder = changed(model, tmp_path / "half", lambda found: found.update({k: v.to(dtype) for k, v in found.items()}))
    [heard] = Recogniser(folder)([read_sound(knocks(tmp_path / "a.wav", 2, np.random.default_rng(0)))])
    assert heard.text
    assert Recogniser(folder)._model.dtype == torch.float32


def test_folders_that_lack_something_are_refused(model, tmp_path):
    """The library would draw random weights, or write nothing; never a traceback of its own."""

    def lacks_fc1(found: dict[str, torch.Tensor]) -> None:
        for key in [key for key in found if "fc1" in key]:
            del found[key]

    def other_shape(found: dict[str, torch.Tensor]) -> None:
        found["model.decoder.embed_tokens.weight"] = torch.zeros(5, 5)

    fc1 = r"model.decoder.layers.0.fc1.bias, model.decoder.layers.0.fc1.weight, \S+ and 1 more"
    for number, (change, cause) in enumerate(
        ((lacks_fc1, f"it lacks the tensors {fc1}"), (other_shape, "in other shapes the tensors model.decoder.embed"))
    ):
        with pytest.raises(InputError, match=rf"\(model_type whisper\) is not loaded as .*: .*{cause}"):
            Recogniser(changed(model, tmp_path / str(number), change))
    whole = (model / "model.safetensors").read_bytes()
    folder = changed(model, tmp_path / "bytes", lambda found: None)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
    for content, cause in (
        (whole[:-1000], "file not fully covered"),
        (b"", "model.safetensors: it is empty"),
        (pointer, "a Git LFS pointer"),
    ):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=rf"bytes \(model_type whisper\) .*{cause}"):
            Recogniser(folder)
    mute = changed(model, tmp_path / "mute", lambda found: None)
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="its tokenizer has no tokens"):
        Recogniser(mute)


def test_the_command_makes_a_source_of_text(model, tmp_path, capsys):
    """Status 1 where a file failed, 0 where none did; the next command trains on the text."""
    good = knocks(tmp_path / "a.wav", 3, np.random.default_rng(0))
    (tmp_path / "b.wav").write_text("no sound")
    options = TranscribeOptions(model=model, out=tmp_path / "t.jsonl", device="cpu")
    assert transcribe(tmp_path, options=options) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "1 file transcribed into" in out
    assert "1 failed" in out
    assert command_line("train", "tiny.yaml", "--run-dir", "runs/speech", source_of(options.out)) in out
    assert transcribe(good, options=options) == 0
    assert "1 were there already" in " ".join(capsys.readouterr().out.split())
    [document] = iterate_documents(SourceConfig(name="speech", files=str(options.out)))
    assert document.text == rows(options.out)[0]["text"]
    with pytest.raises(InputError, match="SOUNDS is missing"):
        transcribe(options=options)


def test_an_interruption_says_what_is_there(model, tmp_path, capsys, monkeypatch):
    """And that the same command goes on."""
    sound = knocks(tmp_path / "a.wav", 1, np.random.default_rng(0))
    options = TranscribeOptions(model=model, out=tmp_path / "t.jsonl", device="cpu")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_gpt.speech.transcribe.transcribe_files", interrupted)
    assert transcribe(sound, options=options) == 130
    assert "t.jsonl has 0 of 1 files, and the same command continues" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same_rows(model, tmp_path):
    """SIGKILL at several instants; the rows are those of a call that nothing disturbed."""
    for number in range(30):
        knocks(tmp_path / "in" / f"{number:02d}.wav", 3, np.random.default_rng(number))
    words = [
        sys.executable,
        "-m",
        "moe_gpt",
        "transcribe",
        str(tmp_path / "in"),
        "--model",
        str(model),
        "--device",
        "cpu",
    ]
    subprocess.run([*words, "--out", str(tmp_path / "whole.jsonl")], check=True, stdout=subprocess.DEVNULL)
    out, kills = tmp_path / "t.jsonl", 0
    for n_rows in (1, 7, 20):
        process = subprocess.Popen([*words, "--out", str(out)], stdout=subprocess.DEVNULL)
        while process.poll() is None and not (out.exists() and len(out.read_bytes().splitlines()) >= n_rows):
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run([*words, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    assert kills
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
