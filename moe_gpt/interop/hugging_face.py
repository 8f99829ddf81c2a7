"""Folders of Hugging Face's transformers: read Mixtral, Mistral and Llama, write Mixtral and Llama.

An exported folder has the tensors of the released Mixtral (one matrix per expert), which transformers, vLLM and
llama.cpp's converter read without moe_gpt. An imported folder becomes a ``MoEGPT`` with the same logits.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_gpt.config import LossConfig, ModelConfig
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError, shown
from moe_gpt.files.durable import complete_folder, filled_folder, write_file
from moe_gpt.files.inside import read_json
from moe_gpt.files.mistaken import odd_name
from moe_gpt.files.tensors import TensorReader, TensorSpec, open_folder, write_sharded
from moe_gpt.inference.quantised import kind_of
from moe_gpt.interop.foreign_tokenizer import load_tokenizer
from moe_gpt.interop.mixtral_layout import Slice, from_hugging_face, tensor_table, to_hugging_face
from moe_gpt.interop.tokenizer_files import Chat, token_ids, write_json, write_tokenizer
from moe_gpt.measure.shapes import shapes_only
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.vision.seeing import SeeingModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_READABLE_DTYPES = ("F64", "F32", "BF16", "F16")


class LoadedFolder(NamedTuple):
    """A model with its tokenizer."""

    model: MoEGPT
    tokenizer: Tokenizer
    text_start: list[int]
    """Ids that the tokenizer's template puts before every text, such as Llama's <s>; none for models trained here."""
    path: Path


def is_model_folder(path: str | Path) -> bool:
    """Whether a path looks like a Hugging Face folder, which has a config.json, though it may be a broken link."""
    return os.path.lexists(Path(path) / "config.json")


def load(folder: str | Path, max_seq_len: int | None = None, dtype: torch.dtype = torch.float32) -> MoEGPT:
    """Return the model of a Mixtral, Mistral or Llama folder, in evaluation mode.

    Experts may be stored separately, as in the release, or fused, as in transformers 5. Weights are read one tensor at
    a time, so loading needs little more memory than the model.

    Args:
        folder: holds config.json and safetensors.
        max_seq_len: the context to use instead of the folder's.
        dtype: of the weights; training needs float32.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        InputError: for another architecture; for settings that this model does not have (one line each); for tensors
            that are missing, left over, cut off or of another shape than config.json says.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    model, table, reader = _open(Path(folder), max_seq_len)
    model.to(dtype).to_empty(device="cpu")
    if model.config.tie_embeddings:  # to_empty unties them
        model.output.weight = model.embedding.weight
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in table.items():
            part.of(own[part.name]).copy_(finite(reader.read(name), f"{folder}: {name}"))
    return model.eval()


def finite(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor; raise ``InputError`` for values that are not finite."""
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name} has values that are not finite")
    return tensor


def check(folder: str | Path, max_seq_len: int | None = None) -> ModelConfig:
    """Check a folder as ``load`` does, but without reading the weights, and return its model's config.

    The errors are those of ``load``, except the one for values that are not finite.
    """
    return _open(Path(folder), max_seq_len)[0].config


def _open(folder: Path, max_seq_len: int | None) -> tuple[MoEGPT, dict[str, Slice], TensorReader]:
    """Return a folder's model without memory, the table that maps tensors to its weights, and the files' reader."""
    if max_seq_len is not None and max_seq_len < 1:
        raise ValueError(f"max_seq_len must be at least 1, got {max_seq_len}")
    config = _read_model_config(folder, max_seq_len)
    reader = open_folder(folder)
    _check_no_adapter(folder)
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in reader.names)
    n_least = config.n_layers * (1 if is_fused else config.n_experts)
    if n_least > len(reader.names):  # the shapes of an absurd number of layers would take long to list
        raise InputError(
            f"{folder}: num_hidden_layers is {config.n_layers}, num_local_experts {config.n_experts}, but there are "
            f"{len(reader.names)} tensors"
        )
    table = tensor_table(config, "fused" if is_fused else "per_expert")
    model = shapes_only(config)
    _check_tensors(folder, config, _shapes(model, table), reader)
    return model, table, reader


def _check_no_adapter(folder: Path) -> None:
    """Raise ``InputError`` for an adapter beside whole weights: transformers with peft adds it to them."""
    for path in (*folder.glob("adapter_config.json"), *folder.glob("adapter_model.*")):
        raise InputError(
            f"{path} lies beside whole weights, and adapters are not read here; merge it into them with "
            "merge_and_unload() of peft, or move it elsewhere to use the weights without it"
        )


def load_with_tokenizer(
    folder: str | Path, device: str | torch.device = "cpu", max_seq_len: int | None = None
) -> LoadedFolder:
    """Return a folder's model and tokenizer; errors are those of ``load`` and ``load_tokenizer``."""
    folder = Path(folder)
    check(folder, max_seq_len)  # reports a wrong architecture before a missing tokenizer
    tokenizer = load_tokenizer(folder)
    return LoadedFolder(load(folder, max_seq_len).to(device).eval(), tokenizer, tokenizer.template()[0], folder)


def _read_model_config(folder: Path, max_seq_len: int | None) -> ModelConfig:
    values = read_json(folder, "config.json")
    try:
        return from_hugging_face(values, max_seq_len)
    except InputError as error:
        place = folder / "config.json"
        raise InputError("\n".join(f"{place}: {line}" for line in str(error).splitlines())) from None


def _shapes(model: MoEGPT, table: dict[str, Slice]) -> dict[str, tuple[int, ...]]:
    own = dict(model.named_parameters())
    return {name: tuple(part.of(own[part.name]).shape) for name, part in table.items()}


def _stored_names(folder: Path, config: ModelConfig, reader: TensorReader) -> set[str]:
    """Return the stored tensors that the model needs: no rotary frequencies, and a tied matrix once."""
    found = {name for name in reader.names if not name.endswith(".rotary_emb.inv_freq")}  # rope_theta gives them
    if config.tie_embeddings and "lm_head.weight" in found:  # some writers store a tied matrix twice
        if not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")):
            raise InputError(f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
        found.remove("lm_head.weight")
    return found


def _check_tensors(folder: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]], reader: TensorReader) -> None:
    found = _stored_names(folder, config, reader)
    if renamed := _renamed(found - shapes.keys()):
        raise InputError(f"{folder}: {renamed}")
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - found)]
    problems += [f"{name} is left over" for name in sorted(found - shapes.keys())]
    problems += [line for name in sorted(shapes.keys() & found) for line in _unfit(reader, name, shapes[name])]
    if problems:
        shown = problems[:5] + [f"and {len(problems) - 5} more"] * (len(problems) > 5)
        raise InputError(f"{folder}: the tensors are not those that config.json describes\n" + "\n".join(shown))


_WRAPPERS = {
    "lora_": "it belongs to a LoRA adapter; save the result of merge_and_unload() of peft",
    "base_model.": "the model is wrapped by peft; save the result of merge_and_unload()",
    "_orig_mod.": "the model is wrapped by torch.compile; save model._orig_mod",
    "_fsdp_wrapped_module.": "the model is wrapped by FSDP; save its full state with the names of the model inside",
    "_checkpoint_wrapped_module.": "its layers are wrapped for activation checkpointing; save the model without them",
    "module.": "the model is wrapped by DataParallel, DDP or DeepSpeed; save model.module",
    "": "save the whole ...ForCausalLM with save_pretrained of transformers, or rename the tensors",
}
"""What the names of tensors have in them, and what to do about it."""


def _renamed(left_over: set[str]) -> str | None:
    """Say how left-over tensors must be named instead, if a wrapper has changed all names; None if none has."""
    norm = r"(?P<before>.*?)(layers\.0\.)(?P<within>.*?)input_layernorm\.weight"
    name = next((name for name in sorted(left_over) if re.fullmatch(norm, name) or ".lora_" in name), None)
    if name is None:
        return None
    remedy = next(remedy for part, remedy in _WRAPPERS.items() if part in name)
    wanted = "" if "lora_" in name else ", but must be named model.layers.0.input_layernorm.weight, and so all others"
    return f"a tensor is named {shown(name)}{wanted}: {remedy}"


def _unfit(reader: TensorReader, name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield the problem of a stored tensor, if it has one."""
    if reader.shape(name) != shape:
        yield f"{name} has shape {reader.shape(name)}, config.json says {shape}"
    elif reader.dtype(name) not in _READABLE_DTYPES:
        yield f"{name} is {reader.dtype(name)}, not one of {', '.join(_READABLE_DTYPES)}"


def save(
    model: MoEGPT,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    load_balancing_loss_weight: float = LossConfig.load_balancing_loss_weight,
) -> None:
    """Write a folder from which ``transformers.AutoModelForCausalLM.from_pretrained`` loads the same function.

    A model with experts becomes a Mixtral, a dense one a Llama. Using it does not need ``moe_gpt``.

    Args:
        folder: new or empty.
        tokenizer: written beside the weights, for ``AutoTokenizer.from_pretrained``, with its template if it has one.
        dtype: torch.float32 or torch.bfloat16, of the weights in the files.
        load_balancing_loss_weight: ours, translated into ``router_aux_loss_coef``.

    Raises:
        InputError: for a user's router or quantised weights; for settings that Mixtral lacks
            (``normalize_topk: false``, or ``balance: bias`` after the bias has moved); for a tokenizer with more tokens
            than the model; for weights that are not finite; for a folder that is not empty or cannot be written.
        ValueError: for another dtype.
    """
    require_exportable(model)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    export(model.config, own.__getitem__, folder, tokenizer, dtype, load_balancing_loss_weight)


def require_plain_weights(model: MoEGPT) -> None:
    """Raise ``InputError`` for quantised weights."""
    if kind := kind_of(model):
        raise InputError(f"the model's weights are {kind} already; export the model that they were made from")


def require_exportable(model: MoEGPT) -> None:
    """Raise ``InputError`` for quantised weights, for a user's router and for a model that sees."""
    require_plain_weights(model)
    if isinstance(model, SeeingModel):
        raise InputError("this kind of folder has no place for the encoder and cross-attention of a model that sees")
    for layer in model.moe_layers():
        if type(layer.router) is not Router:
            raise InputError(own_router_text(type(layer.router).__qualname__))


def own_router_text(name: str) -> str:
    """Say why a model with a user's router cannot be exported."""
    return (
        f"a model with the router {name} cannot be exported: the folder always has a linear top-k router, so it would "
        "compute another function"
    )


def export(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    folder: str | Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    load_balancing_loss_weight: float,
    model_card: str | None = None,
    keep_template: bool = True,
    chat: Chat | None = None,
) -> None:
    """Write a folder as ``save`` does, but from weights that are read one tensor at a time.

    The folder appears complete or not at all.

    Args:
        read: returns one of the model's tensors by our name.
        model_card: contents of README.md, if given.
        keep_template: keep the tokenizer's template, which puts tokens such as Llama's <s> around a text. Training here
            does not add them, so a model that was trained here works best without the template.
        chat: how conversations are written, for a model that chats.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype!r}")
    settings = to_hugging_face(config, load_balancing_loss_weight)
    _check_biases(config, read)
    name = str(dtype).removeprefix("torch.")
    settings |= {"torch_dtype": name, "dtype": name, **token_ids(config, tokenizer, keep_template)}
    with new_folder(folder) as temporary:
        _write_weights(temporary, config, read, dtype)
        write_json(temporary / "config.json", settings)
        if tokenizer:
            write_tokenizer(temporary, tokenizer, settings, keep_template, chat)
        if model_card:
            write_file(temporary / "README.md", [model_card.encode("utf-8")])


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Fill a folder, new or empty, that appears complete or not at all; raise ``InputError`` where that cannot be."""
    try:
        path = _new_or_empty(folder)
        with filled_folder(path) if path.exists() else complete_folder(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error


def _write_weights(folder: Path, config: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    table = tensor_table(config)

    def read_slice(name: str) -> Tensor:
        return finite(table[name].of(read(table[name].name)), table[name].name)

    shapes = _shapes(shapes_only(config), table)
    write_sharded(folder, [TensorSpec(name, shape, dtype) for name, shape in shapes.items()], read_slice)


def _new_or_empty(folder: str | Path) -> Path:
    path = Path(folder)
    if not str(folder).strip() or odd_name(path):
        raise InputError(f"the output folder must have a name in UTF-8, got {shown(str(folder))}")
    is_broken = path.is_symlink() and not path.exists()
    if is_broken or _is_taken(path):
        raise InputError(f"the output folder must be new or empty, got {'a broken link, ' * is_broken}{path}")
    return path


def _is_taken(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _check_biases(config: ModelConfig, read: Callable[[str], Tensor]) -> None:
    if config.balance != "bias" or config.is_dense:
        return
    n_moved = sum(bool(read(f"blocks.{i}.feed_forward.router.expert_bias").any()) for i in range(config.n_layers))
    if n_moved:
        raise InputError(
            f"model.balance: bias cannot be exported as Mixtral: the balancing bias of {n_moved} of {config.n_layers} "
            "layers changes which experts are chosen, and Mixtral has no such bias; train with model.balance=loss"
        )
