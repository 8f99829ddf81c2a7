"""``moe-gpt transcribe``: speech to text that a model can train on."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.options import Device, flat
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class TranscribeOptions:
    """The model, where the text goes, and the device."""

    model: Annotated[Path, Parameter(name="--model")]
    """Folder of a Whisper-like model of transformers, or of moe-gpt hear."""
    out: Path = Path("text.jsonl")
    """File of JSON lines, one a sound file. Files that it has already, from the same model, are passed over."""
    language: str | None = None
    """Language of the speech, such as en, for models of several; by default the model decides."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


def transcribe(*sounds: Path, options: TranscribeOptions) -> int:
    """Write down what is said in sound files, as JSON lines with text, file, seconds, digest and model.

    Interrupted, the same command goes on. A file that cannot be read is named and passed over.

    Args:
        sounds: Files, or folders of them: WAV, FLAC, Ogg, MP3, AIFF and others, of any rate.
    """
    if not sounds:
        raise InputError("SOUNDS is missing; give sound files or a folder of them")
    try:
        from moe_gpt.speech.recogniser import Recogniser
        from moe_gpt.speech.transcribe import find_sounds, open_transcript, transcribe_files
    except ImportError as error:
        raise InputError(
            f"transcribe needs {error.name}, which is not installed: pip install 'moe_gpt[senses]'"
        ) from None

    from moe_gpt.ops.device import pick_device
    from moe_gpt.terminal.progress import ProgressBar

    paths = find_sounds(sounds)
    with open_transcript(options.out, str(options.model)) as transcript:
        hears = Recogniser(options.model, pick_device(options.device), options.language)
        bar = ProgressBar("transcribing", total=len(paths))

        def tick(done: int) -> None:
            text = f"{done:,} of {len(paths):,} files"
            bar.update(done, text, text)

        with contextlib.closing(bar):
            outcome = transcribe_files(paths, hears, transcript, bar.warn, tick)
    kept = f", {outcome.kept:,} were there already" if outcome.kept else ""
    print(wrap(f"{outcome.done:,} files transcribed into {options.out}{kept}; {len(outcome.failed):,} failed"))
    print(*[f"next:\n  {command_line('train', 'tiny.yaml', source_of(options.out))}\n"] * bool(transcript.rows), end="")
    return 1 if outcome.failed else 0


def source_of(path: Path) -> str:
    """Return the setting of a config that trains on a transcript."""
    return f"data.sources=[{{name: speech, files: [{path}]}}]"
