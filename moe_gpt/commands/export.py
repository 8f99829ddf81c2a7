"""``moe-gpt export``: write a model as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.options import flat
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.training.saving.saved_model import SavedModel


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How the folder is written."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the files."""
    license: str = "unknown"
    """License identifier for the model card, such as apache-2.0."""


def export(model: str, folder: Path, *, options: ExportOptions = ExportOptions()) -> None:
    """Write a model as a Hugging Face folder, and print how to use it.

    A model with experts becomes a MixtralForCausalLM, a dense one a LlamaForCausalLM. Transformers, vLLM and llama.cpp
    open them without moe_gpt (docs/running-elsewhere.md).

    Args:
        model: A run folder (its newest checkpoint) or a checkpoint.
        folder: The folder to write, new or empty.
    """
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", options.license):
        raise InputError(f"--license must be an identifier such as apache-2.0, got {options.license!r}")

    from moe_gpt.interop import hugging_face
    from moe_gpt.interop.model_card import Training, model_card
    from moe_gpt.training.records.metrics import scores_at
    from moe_gpt.training.saving.saved_model import describe_model, open_checkpoint

    saved = open_checkpoint(model)
    config = saved.config
    if saved.router:
        raise InputError(hugging_face.own_router_text(saved.router["name"]))
    training = Training(
        config,
        saved.step,
        saved.tokens_seen,
        scores_at(saved.run_dir / "metrics.jsonl", saved.step),
        describe_model(saved.initialised_from) if saved.initialised_from else None,
        saved.trained_length,
    )
    hugging_face.export(
        config.model,
        saved.weights.read,
        folder,
        saved.tokenizer,
        hugging_face.DTYPES[options.dtype],
        config.loss.load_balancing_loss_weight,
        model_card(folder.absolute().name, training, options.dtype, options.license),
        keep_template=False,
    )
    architecture = "LlamaForCausalLM" if config.model.is_dense else "MixtralForCausalLM"
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{saved.path} -> {folder}: {architecture}, {options.dtype}, {n_bytes / 1e6:,.1f} MB")
    for note in notes(saved):
        print(wrap(f"note: {note}"))
    print(f"next:\n  {command_line('generate', folder, '--prompt', 'def ')}")
    print(f"or, in Python with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def notes(saved: SavedModel) -> Iterator[str]:
    """Yield the differences between an exported model and its training."""
    from moe_gpt.measure.parameters import count_parameters

    config = saved.config
    if config.model.attention_sharing > 1:
        total = count_parameters(config.model).total
        yield f"shared attention weights are written for each layer, so the files hold more than {total:,} parameters"
    if config.model.capacity_factor:
        yield "model.capacity_factor dropped tokens in training only; the exported model drops none"
    start, end = saved.tokenizer.template()
    if start or end:
        spelled = " ".join(saved.tokenizer.spell(index) for index in (*start, *end))
        yield f"the exported tokenizer does not put {spelled} around texts, because training did not"
