"""Speech from espeak-ng, a synthesiser, for the demonstration that trains a model to hear.

The library keeps state between calls: the same call gives other samples after other calls, and the same calls in the
same order give the same samples. So a set of clips is made in one order, in a process of its own.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import espeakng_loader
import numpy as np
import soxr

from moe_gpt.errors import InputError
from moe_gpt.speech.sound import RATE, Samples

_SYNCHRONOUS, _UTF8, _RATE, _PITCH = 2, 1, 1, 3
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Speaker(NamedTuple):
    """How a sentence is said."""

    accent: str
    """A voice file of espeak-ng, such as ``gmw/en-US``."""
    variant: str
    """A file of its folder ``voices/!v``, such as ``klatt2``."""
    words_per_minute: int = 175
    pitch: int = 50
    """0 to 99."""


class Synthesiser:
    """espeak-ng of the package espeakng-loader, without its own thread, which may wait for ever. One a process.

    Raises:
        InputError: where the library does not start.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._data = Path(espeakng_loader.get_data_path())
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(self._data).encode(), 0)
        if self._rate <= 0:
            raise InputError("espeak-ng does not start; install espeakng-loader anew")
        self._pieces: list[np.ndarray[Any, np.dtype[np.int16]]] = []
        self._callback = _Callback(self._keep)  # kept, because the library calls it later
        self._library.espeak_SetSynthCallback(self._callback)

    def variants(self) -> list[str]:
        """Return the names of all variants of a voice."""
        return sorted(path.name for path in (self._data / "voices" / "!v").iterdir())

    def say(self, text: str, speaker: Speaker) -> Samples:
        """Return a sentence as samples of shape (n_samples,), 16 kHz, in -1 to 1.

        Raises:
            InputError: where espeak-ng lacks the accent or the variant, for which it would use another one.
        """
        if not (self._data / "voices" / "!v" / speaker.variant).is_file():
            raise InputError(f"espeak-ng has no variant {speaker.variant}")
        if self._library.espeak_SetVoiceByName(f"{speaker.accent}+{speaker.variant}".encode()):
            raise InputError(f"espeak-ng has no accent {speaker.accent}")
        self._library.espeak_SetParameter(_RATE, speaker.words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, speaker.pitch, 0)
        self._pieces, encoded = [], text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
        samples = np.concatenate(self._pieces).astype(np.float32) / 32768
        return soxr.resample(samples, self._rate, RATE)

    def _keep(self, samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0
