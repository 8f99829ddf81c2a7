"""``moe-gpt transcribe``: speech to text that a model can train on."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.options import Device, flat
from moe_gpt.errors import InputError
from moe_gpt.terminal.numbers import plural
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.speech.transcribe import Outcome


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
        from moe_gpt.speech.transcribe import find_sounds, open_transcript, printable, transcribe_files
    except ImportError as error:
        raise InputError(
            f"transcribe needs {error.name}, which is not installed: pip install 'moe_gpt[senses]'"
        ) from None

    from moe_gpt.files.transformers_folder import digest_of_folder
    from moe_gpt.ops.device import pick_device
    from moe_gpt.terminal.progress import ProgressBar

    paths = find_sounds(sounds, lambda text: print(wrap(f"note: {printable(text)}"), file=sys.stderr))
    digest = digest_of_folder(options.model, "tokenizer*", "vocab*", "generation_config.json")
    with open_transcript(options.out, str(options.model), digest, options.language) as transcript:
        hears = Recogniser(options.model, pick_device(options.device), options.language)
        bar = ProgressBar("transcribing", total=len(paths))

        def tick(done: int) -> None:
            text = f"{done:,} of {len(paths):,} files"
            bar.update(done, text, text)

        try:
            with contextlib.closing(bar):
                outcome = transcribe_files(paths, hears, transcript, bar.warn, tick)
        except KeyboardInterrupt:
            n = f"{len(transcript.rows):,} of {len(paths):,}"
            print(f"interrupted; {options.out} has {n} files, and the same command continues", file=sys.stderr)
            return 130
    _tell(outcome, options.out, bool(transcript.rows))
    return 1 if outcome.failed else 0


def _tell(outcome: Outcome, out: Path, has_rows: bool) -> None:
    """Print what became of the files, and a command that trains on the text."""
    kept = f", {outcome.kept:,} were there already" if outcome.kept else ""
    print(wrap(f"{plural(outcome.done, 'file')} transcribed into {out}{kept}; {len(outcome.failed):,} failed"))
    if has_rows:
        print(f"next:\n  {command_line('train', 'tiny.yaml', '--run-dir', 'runs/speech', source_of(out))}")


def source_of(path: Path) -> str:
    """Return the setting of a config that trains on a transcript."""
    return f"data.sources=[{{name: speech, files: [{path}]}}]"
