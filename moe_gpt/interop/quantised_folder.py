"""Folders of quantised weights, which only moe_gpt reads: settings, one safetensors file, the tokenizer.

The file does not depend on the machine: ``Quantised`` puts numbers into the order of the CPU's kernels when it gets
them. A quantised matrix NAME is two tensors, NAME.numbers and NAME.scales, and ``round_weight`` says what they hold.
All others are there in float32, by our names.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from moe_gpt.config import ModelConfig
from moe_gpt.config.section import Count, CountOrZero, Section
from moe_gpt.config.yaml import to_plain
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import ConfigError, InputError, shown
from moe_gpt.files.durable import write_file
from moe_gpt.files.inside import inside, read_json
from moe_gpt.files.tensors import TensorReader, TensorSpec, write_tensors
from moe_gpt.inference.quantised import Quantised, matrix_kind, put, round_weight
from moe_gpt.interop.foreign_tokenizer import check_vocabulary, read_tokenizer
from moe_gpt.interop.hugging_face import finite, new_folder, require_exportable
from moe_gpt.interop.tokenizer_files import write_json
from moe_gpt.measure.shapes import shapes_only
from moe_gpt.model.transformer import MoEGPT

SETTINGS, WEIGHTS, TOKENIZER = "quantised.json", "quantised.safetensors", "tokenizer.json"
_NOTE = "Only moe_gpt reads this folder (docs/quantised.md). For transformers, export without --quantize."
_TRAVELLERS = ("chat_template.jinja", "tokenizer_config.json")  # copied as they are: chat templates are in either


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """What quantised.json says."""

    format: Literal["moe_gpt quantised weights, version 1"] = "moe_gpt quantised weights, version 1"
    """Of the folder."""
    note: str = _NOTE
    """For people."""
    kind: Literal["int8", "int4"]
    """Of the weights."""
    model: ModelConfig
    """The shape."""
    end_of_text: str | None = None
    """The token that ends a text; null without a tokenizer."""
    text_start: tuple[CountOrZero, ...] = ()
    """Ids that stand before every text."""
    trained_length: Count | None = None
    """The longest sequence of training, if it is known."""


def is_quantised_folder(path: str | Path) -> bool:
    """Whether a path looks like a folder of quantised weights."""
    return os.path.lexists(Path(path) / SETTINGS)


def save(
    folder: str | Path,
    model: MoEGPT,
    settings: Settings,
    tokenizer: Tokenizer | None,
    source: Path,
    chat_template: str | None = None,
) -> None:
    """Write a model's weights, quantised, with its tokenizer; the folder appears complete or not at all.

    Args:
        folder: new or empty.
        model: stays as it is, with whole weights.
        settings: ``kind`` is what the weights become.
        tokenizer: None for a model that reads no text.
        source: the folder that the model came from, for its chat template.
        chat_template: that of a run, whose folder has none.

    Raises:
        InputError: for a user's router; for weights that are quantised or not finite; where the folder cannot be made.
    """
    require_exportable(model)
    tensors = {name: finite(tensor, name) for name, tensor in _stored(model, settings.kind).items()}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with new_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS, specs, tensors.__getitem__, {"note": _NOTE, "kind": settings.kind})
        write_json(temporary / SETTINGS, to_plain(settings))
        if tokenizer:
            write_file(temporary / TOKENIZER, [tokenizer.to_json().encode()])
        if chat_template:
            write_file(temporary / "chat_template.jinja", [chat_template.encode()])
        for name in _TRAVELLERS:
            if inside(source, name).is_file():
                write_file(temporary / name, [inside(source, name).read_bytes()])


def load(folder: str | Path) -> tuple[MoEGPT, Tokenizer | None, Settings]:
    """Return a folder's model, in evaluation mode, its tokenizer, if it has one, and its settings.

    Raises:
        InputError: where settings are wrong or unknown, tensors are not what they say, or the tokenizer does not fit.
    """
    folder = Path(folder)
    try:
        settings = Settings.from_mapping(read_json(folder, SETTINGS))
    except ConfigError as error:
        raise InputError("\n".join(f"{folder / SETTINGS}: {line}" for line in error.problems)) from None
    tokenizer = None
    if settings.end_of_text is not None:
        tokenizer = read_tokenizer(inside(folder, TOKENIZER), settings.end_of_text)
        check_vocabulary(f"{folder}: ", tokenizer, settings.model.vocab_size or 0)
        if (last := max(settings.text_start, default=0)) >= tokenizer.vocab_size:
            raise InputError(f"{folder / SETTINGS}: text_start must have ids of the tokenizer, got {last}")
    return _read_model(inside(folder, WEIGHTS), settings), tokenizer, settings


def _read_model(path: Path, settings: Settings) -> MoEGPT:
    reader, n_layers = TensorReader([path]), settings.model.n_layers
    if n_layers > len(reader.names):  # the shapes of an absurd number of layers would take long to list
        raise InputError(f"{path} must have the tensors of model.n_layers={n_layers}, got {len(reader.names)} in all")
    model, found = shapes_only(settings.model), {name: reader.read(name) for name in reader.names}
    _check(path, _stored(model, settings.kind), found)
    for name, tensor in _tensors(model).items():
        if matrix_kind(name, settings.kind):
            put(model, name, Quantised(found[f"{name}.numbers"], found[f"{name}.scales"], tensor.shape[-1]))
        else:  # a copy, because the reader's may be a part of the file
            model.load_state_dict({name: found[name].clone()}, strict=False, assign=True)
    if settings.model.tie_embeddings:
        model.output.weight = model.embedding.weight
    return model.eval()


def _check(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ``InputError`` for the first tensor that is missing, left over, not finite, or of another shape or type."""
    for name in sorted(wanted.keys() | found.keys()):
        needed, got = (
            f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"
            for tensors in (wanted, found)
        )
        if needed != got:
            raise InputError(f"{path}: {shown(name)} must be {needed}, got {got}")
        finite(found[name], f"{path}: {name}")


def _tensors(model: MoEGPT) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _stored(model: MoEGPT, kind: str) -> dict[str, Tensor]:
    """Return what a file holds of a model; of a model without memory, the shapes and types of that."""
    stored = {}
    for name, tensor in _tensors(model).items():
        if format := matrix_kind(name, kind):
            stored[f"{name}.numbers"], stored[f"{name}.scales"] = round_weight(tensor, format)
        else:
            stored[name] = tensor.float()
    return stored
