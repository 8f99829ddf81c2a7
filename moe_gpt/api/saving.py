"""Write a model for other programs."""

from __future__ import annotations

from pathlib import Path

from moe_gpt.api.loaded import LanguageModel
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.interop import hugging_face, mllama_folder
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.adapters import merged
from moe_gpt.training.setup import Run
from moe_gpt.vision.seeing import SeeingModel


def save(model: MoEGPT | LanguageModel | Run, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a model as a Hugging Face folder, Mixtral or Llama, which ``load`` and transformers read.

    A dense model that sees becomes a Mllama, which transformers alone reads (``interop.mllama_folder``).

    Args:
        model: a ``MoEGPT``, or the result of ``load`` or ``train``, which has a tokenizer. Adapters are merged.
        folder: new or empty.
        tokenizer: tokenizer of a ``MoEGPT``; a folder without one loads as a model that cannot read text.

    Raises:
        InputError: for a model with your own router, because a Mixtral would compute something else; for a mixture that
            sees.
    """
    if isinstance(model, LanguageModel):
        _write(model.model, folder, tokenizer or model.tokenizer)
    elif isinstance(model, Run):
        _write(merged(model.state.model), folder, tokenizer or model.data.tokenizer)
    else:
        _write(merged(model), folder, tokenizer)


def _write(model: MoEGPT, folder: str | Path, tokenizer: Tokenizer | None) -> None:
    if isinstance(model, SeeingModel):
        mllama_folder.save(model, folder, tokenizer)
    else:
        hugging_face.save(model, folder, tokenizer)
