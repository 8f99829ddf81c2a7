"""Sound files to JSON lines that ``files:`` of a config reads: one row a file, with its text and its origin."""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import filelock
import numpy as np

from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.files.json_lines import read_json_lines
from moe_gpt.speech.recogniser import Heard
from moe_gpt.speech.sound import Samples, Sound, open_sound
from moe_gpt.speech.windows import Window, windows

SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64"}
"""What is taken from a folder. A file that is named itself may have any."""
_MADE_BY = ("model", "model_sha256", "language")
_KEYS = {"text": str, "audio": str, "seconds": float, "sha256": str, "model": str}
_START = b'{"text": "'
_FOREIGN = "has lines that transcribe did not write; give another --out"


class Hears(Protocol):
    """What writes down sound; ``Recogniser`` is one."""

    @property
    def window_seconds(self) -> float:
        """The longest sound that it takes at once."""

    def __call__(self, windows: list[Samples]) -> list[Heard]:
        """Return the text of each window."""


class Outcome(NamedTuple):
    """What became of the files."""

    done: int
    kept: int
    """Files that an earlier call had transcribed."""
    failed: list[str]
    """An error for each of the others."""


def find_sounds(places: Iterable[Path], warn: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Return the sound files among files and folders, each once, those of a folder in the order of their names.

    Args:
        places: files and folders.
        warn: told of the files in a folder that are not looked at.

    Raises:
        InputError: where a place is not there, or a folder has no sound.
    """
    first: dict[Path, Path] = {}
    for place in places:
        for path in _sounds_in(place, warn):
            first.setdefault(path.resolve(), path)
    return list(first.values())


def _sounds_in(place: Path, warn: Callable[[str], None]) -> list[Path]:
    if not place.exists():
        raise InputError(f"{place} is not there")
    return _search(place, warn) if place.is_dir() else [place]


def _search(place: Path, warn: Callable[[str], None]) -> list[Path]:
    files = sorted(path for path in place.rglob("*") if path.is_file())
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise InputError(f"{place} has no sound files ({', '.join(sorted(SUFFIXES))})")
    if len(paths) < len(files):
        warn(f"{place} has files that are not taken for sound: {_kinds(files)}; name a file to have it read")
    return paths


def _kinds(files: Iterable[Path]) -> str:
    """Return how many files have each ending that is none of sound, the most frequent first."""
    found = collections.Counter(path.suffix or path.name for path in files if path.suffix.lower() not in SUFFIXES)
    return ", ".join(f"{n:,} {kind}" for kind, n in found.most_common())


def printable(text: object) -> str:
    """Return a text, such as a path, with what is no Unicode of a file's name as an escape."""
    return str(text).encode(errors="backslashreplace").decode()


def transcribe(sound: Sound, hears: Hears) -> tuple[dict[str, Any], list[str]]:
    """Return the text of a file with its length and digest, and remarks on what may be lacking in it."""
    if sound.is_silent:
        return {"text": "", **_facts(sound)}, []
    texts: list[str] = []
    remarks: list[str] = []
    for window in windows(sound.blocks(), hears.window_seconds):
        if np.any(window.samples):
            [heard] = hears([window.samples])
            texts.append(heard.text)
            remarks.extend(_lacking(window, heard))
    return {"text": " ".join(filter(None, texts)), **_facts(sound)}, remarks


def _lacking(window: Window, heard: Heard) -> Iterator[str]:
    """Yield what the text of a window may lack."""
    if not heard.is_whole:
        yield f"at {window.start:.1f} s the model reached its limit of tokens; text may be lacking"
    if not window.ends_in_pause:
        yield f"there is no pause before {window.end:.1f} s; a word may be cut there"


def _facts(sound: Sound) -> dict[str, Any]:
    return {"audio": _name(sound), "seconds": round(sound.seconds, 3), "sha256": sound.sha256}


def _name(sound: Sound) -> str:
    """Return the whole path, so that one file has one name from wherever the command is called."""
    return printable(sound.path.resolve())


class Transcript:
    """The file of rows, which grows by a row for each sound file and can be gone on with.

    Args:
        path: of the JSON lines.
        model: name of the model, which every row has.
        digest: of the model's files.
        language: that it was told to write.

    Raises:
        InputError: where the file has rows of something else, or of another model or language.
    """

    def __init__(self, path: Path, model: str, digest: str = "", language: str | None = None) -> None:
        self.path = path
        self.made_by = dict(zip(_MADE_BY, (model, digest, language), strict=True))
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        found = read_json_lines(path, stops_at_damage=True)
        for row in found.lines:
            self._check(row)
            self.rows[row["audio"]] = row
        if found.n_left_out:
            self._drop_torn_line(found.n_left_out)

    def _check(self, row: dict[str, Any]) -> None:
        if any(not isinstance(row.get(key), kind) for key, kind in _KEYS.items()):
            raise InputError(f"{self.path} {_FOREIGN}")
        self._check_maker(row)

    def _check_maker(self, row: dict[str, Any]) -> None:
        for key, value in self.made_by.items():
            if row.get(key) != value:
                text = f"{self.path} was written with the {key} {row.get(key)}, not {value}; give another --out"
                raise InputError(text)

    def _drop_torn_line(self, n_lines: int) -> None:
        """Write the rows without the start of a line that a killed process left at the end of the file."""
        torn = self.path.read_bytes().rpartition(b"\n")[2]
        if n_lines > 1 or not torn or not torn.startswith(_START[: len(torn)]):
            raise InputError(f"{self.path} {_FOREIGN}")
        self._write_anew()

    def has(self, sound: Sound) -> bool:
        """Whether a file is transcribed, with the contents that it has now."""
        row = self.rows.get(_name(sound))
        return row is not None and row["sha256"] == sound.sha256

    def add(self, row: dict[str, Any]) -> None:
        """Write a row and force it to the disk. It takes the place of an earlier row of the same file."""
        row = row | self.made_by
        is_new = row["audio"] not in self.rows
        self.rows[row["audio"]] = row
        if not is_new or not self.path.exists():
            self._write_anew()
        else:
            with open(self.path, "ab") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())

    def _write_anew(self) -> None:
        replace_file(self.path, b"".join(map(_line, self.rows.values())))


@contextlib.contextmanager
def open_transcript(path: Path, model: str, digest: str = "", language: str | None = None) -> Iterator[Transcript]:
    """Give the transcript of a file that no other process writes meanwhile; the arguments are those of ``Transcript``.

    Raises:
        InputError: where another process does, or as for ``Transcript``.
    """
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"another process is writing {path}") from None
    try:
        yield Transcript(path, model, digest, language)
    finally:
        lock.release()  # its file stays: deleting it would let two others in


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def transcribe_files(
    paths: list[Path],
    hears: Hears,
    transcript: Transcript,
    warn: Callable[[str], None],
    tick: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Transcribe the files that the transcript lacks. A file that is bad is passed over.

    Args:
        paths: of sound files.
        hears: the model.
        transcript: where the rows go.
        warn: told what is wrong with a file or with its text.
        tick: told after each file how many have been.
    """
    done, kept, failed = 0, 0, []
    for number, path in enumerate(paths, start=1):
        try:
            sound = open_sound(path)
            if transcript.has(sound):
                kept += 1
            else:
                row, remarks = transcribe(sound, hears)
                for remark in (*sound.remarks, *remarks):
                    warn(printable(f"{path}: {remark}"))
                transcript.add(row)
                done += 1
        except InputError as error:
            failed.append(printable(error))
            warn(f"left out: {failed[-1]}")
        tick(number)
    return Outcome(done, kept, failed)
