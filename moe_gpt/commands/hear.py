"""``moe-gpt hear``: a model from speech to text, trained from scratch on synthesised speech."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.options import Whole, WholeOrZero, flat
from moe_gpt.errors import InputError
from moe_gpt.terminal.tables import format_table
from moe_gpt.terminal.wrapping import wrap

MEANINGS = {
    "known_voices": "new sentences, voices of the training",
    "new_voices": "new sentences, new voices",
    "new_accents": "new sentences, new accents",
    "human": "a human speaker's digits",
    "best_constant": "always the same sentence, the best one",
    "shuffled_sound": "the sound of another sentence",
}


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class HearOptions:
    """Length and seed."""

    seed: WholeOrZero = 0
    """Seed of sentences, speakers, weights and order."""
    steps: Whole = 2000
    """Optimizer steps of 16 sentences."""
    clips: Whole = 6000
    """Sentences that are said for training."""
    human: Annotated[Path | None, Parameter(negative="")] = None
    """Folder with recordings 0.wav to 9.wav of a person, to be tested with too."""


def hear(folder: Path, *, options: HearOptions = HearOptions()) -> None:
    """Train a Whisper of 0.6 M parameters on sentences said by espeak-ng, and print its word error rates.

    It learns a synthesiser that says some 50 words, and fails on people: it shows the way from sound to text.

    Args:
        folder: New folder for the model, which moe-gpt transcribe and transformers read.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder")
    try:
        from moe_gpt.speech.from_scratch import train
    except ImportError as error:
        raise InputError(f"hear needs {error.name}, which is not installed: pip install 'moe_gpt[hear]'") from None
    rates = train(folder, options.seed, options.steps, options.clips, options.human)
    (folder / "scores.json").write_text(json.dumps({"stage": "hear", "seed": options.seed, "after": rates}, indent=1))
    rows = [(MEANINGS[name], f"{rate['score']:.3f}", f"{rate['n']:,}") for name, rate in rates.items()]
    print(format_table(("word error rate", "score", "n"), rows))
    print(wrap(f"next:\n  {command_line('transcribe', 'SOUNDS', '--model', folder)}"))
