"""A Whisper-like model in a transformers folder, as a function from samples to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from moe_gpt.errors import InputError
from moe_gpt.files.transformers_folder import open_parts, refusal
from moe_gpt.speech.sound import RATE, Samples

_WINDOW_SECONDS = 30.0
"""For models whose feature extractor does not say what it takes: Whisper's length."""


class Heard(NamedTuple):
    """What a model wrote for a window."""

    text: str
    is_whole: bool
    """False where the model reached its limit of tokens before the end of the text."""


class Recogniser:
    """Writes down what is said in a window of sound.

    Args:
        folder: of a transformers model from sequences of sound to text: Whisper, Distil-Whisper, Moonshine and others.
        device: where to compute.
        language: of the speech, such as ``en``, for models of several; by default the model decides for each window.

    Raises:
        InputError: where the folder is not of such a model.
    """

    def __init__(self, folder: str | Path, device: torch.device | None = None, language: str | None = None) -> None:
        self.folder, self._device = Path(folder), device or torch.device("cpu")
        self._model, self._tokenizer, self._extractor = _load(self.folder)
        self._model.to(self._device).eval()
        self._options = {} if language is None else self._speaking(language)

    @property
    def window_seconds(self) -> float:
        """The longest sound that the model takes at once."""
        return float(getattr(self._extractor, "chunk_length", None) or _WINDOW_SECONDS)

    @torch.no_grad()
    def __call__(self, windows: Sequence[Samples]) -> list[Heard]:
        """Return the text of each window, greedily decoded.

        Args:
            windows: each of shape (n_samples,), 16 kHz, at most ``window_seconds`` long.
        """
        features = self._extractor(list(windows), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
        ends = _Ends(torch.tensor(self._model.generation_config.eos_token_id, device=self._device), len(windows))
        options = {"num_beams": 1, "do_sample": False, "stopping_criteria": [ends], **self._options}
        ids = self._model.generate(**features.to(self._device), **options)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Heard(text.strip(), is_whole) for text, is_whole in zip(texts, ends.are_whole.tolist(), strict=True)]

    def _speaking(self, language: str) -> dict[str, str]:
        """Return what makes the model write one language.

        Raises:
            InputError: where the model knows one only, or not this one.
        """
        known = getattr(self._model.generation_config, "lang_to_id", None)
        if not known:
            raise InputError(f"{self.folder} is not a model of several languages; leave out --language")
        names = sorted(token.strip("<|>") for token in known)
        if language not in names:
            raise InputError(f"{self.folder} does not know the language {language}; it knows {', '.join(names)}")
        return {"language": language, "task": "transcribe"}


class _Ends(transformers.StoppingCriteria):
    """Notes which rows came to an end of their own; Whisper cuts the token off what it returns. Stops nothing."""

    def __init__(self, ends: Tensor, n_rows: int) -> None:
        self._ends, self.are_whole = ends, torch.zeros(n_rows, dtype=torch.bool, device=ends.device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.are_whole |= torch.isin(input_ids[:, -1], self._ends)
        return torch.zeros_like(self.are_whole)


def _load(folder: Path) -> tuple[Any, Any, Any]:
    what, names = "a model from speech to text", ("AutoModelForSpeechSeq2Seq", "AutoTokenizer", "AutoFeatureExtractor")
    model, tokenizer, extractor = open_parts(folder, what, *names)
    if not tokenizer.vocab_size:
        raise refusal(folder, what, "its tokenizer has no tokens; put tokenizer.json or vocab.json into the folder")
    rate = getattr(extractor, "sampling_rate", RATE)
    if rate != RATE:
        raise InputError(f"{folder} takes {rate:,} samples a second; only models of {RATE:,} are supported")
    return model, tokenizer, extractor
