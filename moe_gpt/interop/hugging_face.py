"""Folders of Hugging Face's transformers: read Mixtral, Mistral and Llama, write Mixtral and Llama.

What is written has the tensors of the released Mixtral (one matrix per expert), which transformers, vLLM and
llama.cpp's converter read without any code of ours. What is read becomes a ``MoEGPT`` with the same logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_gpt.config import LossConfig, ModelConfig
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.durable import complete_folder, write_file
from moe_gpt.interop.mixtral_layout import Slice, from_hugging_face, tensor_table, to_hugging_face
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.tensor_files import TensorReader, TensorSpec, open_folder, write_sharded
from moe_gpt.validation import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_READABLE_DTYPES = ("F64", "F32", "BF16", "F16")


class LoadedFolder(NamedTuple):
    """A model with its tokenizer."""

    model: MoEGPT
    tokenizer: Tokenizer
    text_start: list[int]
    """Ids that the folder's tokenizer puts before every text, such as Llama's <s>; none for models made here."""
    path: Path


def is_model_folder(path: str | Path) -> bool:
    """Whether a path looks like a folder of transformers: it has a config.json."""
    return (Path(path) / "config.json").is_file()


def load(folder: str | Path, max_seq_len: int | None = None, dtype: torch.dtype = torch.float32) -> MoEGPT:
    """Return the model of a Mixtral, Mistral or Llama folder, in evaluation mode.

    Experts may be stored one by one, as released, or fused, as transformers 5 holds them. Weights are read one
    tensor at a time into the model, so it takes little more memory than the model's.

    Args:
        folder: holds config.json and safetensors.
        max_seq_len: the context to use instead of the folder's.
        dtype: of the weights; training wants float32.

    Raises:
        FileNotFoundError: where the folder has no config.json.
        InputError: for another architecture, settings this model does not have (one line each), and tensors that
            are missing, left over, cut off or of another shape than config.json says, by name.
    """
    folder = Path(folder)
    config = read_model_config(folder, max_seq_len)
    reader = open_folder(folder)
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in reader.names)
    table = tensor_table(config, "fused" if is_fused else "per_expert")
    with torch.device("meta"):
        model = MoEGPT(config)
    _check_tensors(folder, config, table, _shapes(model, table), reader)
    model.to_empty(device="cpu").to(dtype)
    if config.tie_embeddings:  # to_empty unties them
        model.output.weight = model.embedding.weight
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in table.items():
            part.of(own[part.name]).copy_(reader.read(name))
    return model.eval()


def load_with_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> LoadedFolder:
    """Return a folder's model and its tokenizer.

    Raises:
        FileNotFoundError: where config.json or tokenizer.json is missing.
        InputError: as ``load``; and for a tokenizer with more tokens than the model.
    """
    folder = Path(folder)
    read_model_config(folder)  # another architecture is the first thing to say
    tokenizer = load_tokenizer(folder)
    return LoadedFolder(load(folder).to(device).eval(), tokenizer, tokenizer.template()[0], folder)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return a folder's tokenizer; its end-of-text is the ``eos_token`` that tokenizer_config.json names.

    Raises:
        FileNotFoundError: where there is no tokenizer.json.
        InputError: where no end-of-text is named, or config.json says that the model has fewer tokens.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers "
            "makes one from other tokenizers"
        )
    end_of_text = _read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(end_of_text, dict):
        end_of_text = end_of_text.get("content")
    if not isinstance(end_of_text, str):
        raise InputError(f"{folder / 'tokenizer_config.json'} must name an eos_token, got {end_of_text!r}")
    tokenizer = Tokenizer.load(path, end_of_text)
    vocab_size = _read_json(folder / "config.json").get("vocab_size")
    if isinstance(vocab_size, int) and vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, config.json says that the model has "
            f"vocab_size={vocab_size}; they are of different models"
        )
    return tokenizer


def read_model_config(folder: Path, max_seq_len: int | None = None) -> ModelConfig:
    """Return the config of a folder's model.

    Raises:
        FileNotFoundError: where there is no config.json.
        InputError: where it describes another architecture; see ``from_hugging_face``.
    """
    path = folder / "config.json"
    try:
        return from_hugging_face(_read_json(path), max_seq_len)
    except InputError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values


def _shapes(model: MoEGPT, table: dict[str, Slice]) -> dict[str, tuple[int, ...]]:
    own = dict(model.named_parameters())
    return {name: tuple(part.of(own[part.name]).shape) for name, part in table.items()}


def _check_tensors(
    folder: Path, config: ModelConfig, table: dict[str, Slice], shapes: dict[str, tuple[int, ...]], reader: TensorReader
) -> None:
    found = {name for name in reader.names if not name.endswith(".rotary_emb.inv_freq")}  # follows from rope_theta
    if config.tie_embeddings and "lm_head.weight" in found:  # some writers store a tied matrix twice
        if not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")):
            raise InputError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        found.remove("lm_head.weight")
    problems = [f"{name} is missing" for name in sorted(table.keys() - found)]
    problems += [f"{name} is left over" for name in sorted(found - table.keys())]
    for name in sorted(table.keys() & found):
        if reader.shape(name) != shapes[name]:
            problems.append(f"{name} has shape {reader.shape(name)}, config.json says {shapes[name]}")
        elif reader.dtype(name) not in _READABLE_DTYPES:
            problems.append(f"{name} is {reader.dtype(name)}, not one of {', '.join(_READABLE_DTYPES)}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{folder}: the tensors are not what config.json describes: {'; '.join(problems[:5])}{more}")


def save(
    model: MoEGPT,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    load_balancing_loss_weight: float = LossConfig.load_balancing_loss_weight,
) -> None:
    """Write a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` opens as the same function.

    A model with experts becomes a Mixtral, a dense one a Llama. ``moe_gpt`` is not needed to use it.

    Args:
        model: on any device.
        folder: new or empty.
        tokenizer: written beside the weights, for ``AutoTokenizer.from_pretrained``.
        dtype: torch.float32 or torch.bfloat16, of the weights in the files.
        load_balancing_loss_weight: ours, translated into ``router_aux_loss_coef``.

    Raises:
        InputError: where the folder is not empty; for settings that change the function and that Mixtral does not
            have (``balance: bias`` once the bias has moved, ``normalize_topk: false``), by name; for a tokenizer with
            more tokens than the model.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    export(model.config, own.__getitem__, folder, tokenizer, dtype, load_balancing_loss_weight)


def export(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    folder: str | Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    load_balancing_loss_weight: float,
    model_card: str | None = None,
) -> None:
    """Write a folder for transformers from weights that are read one tensor at a time; ``save`` says the rest.

    The folder appears complete or not at all.

    Args:
        config: of the model.
        read: returns one of the model's tensors by our name.
        folder: new or empty.
        tokenizer: written where given.
        dtype: of the weights in the files.
        load_balancing_loss_weight: ours.
        model_card: contents of README.md, where given.
    """
    settings = to_hugging_face(config, load_balancing_loss_weight)
    _check_biases(config, read)
    if tokenizer and config.vocab_size and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only vocab_size={config.vocab_size}; they "
            "are of different models"
        )
    table = tensor_table(config)
    with torch.device("meta"):
        shapes = _shapes(MoEGPT(config), table)
    name = str(dtype).removeprefix("torch.")
    end = tokenizer.end_of_text_id if tokenizer else None
    settings |= {"bos_token_id": end, "eos_token_id": end, "torch_dtype": name, "dtype": name}
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"the output folder must be new or empty, got {folder}")
    with complete_folder(folder) as temporary:
        specs = [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]
        write_sharded(temporary, specs, lambda name: table[name].of(read(table[name].name)))
        _write_json(temporary / "config.json", settings)
        if tokenizer:
            _write_tokenizer(temporary, tokenizer, config)
        if model_card:
            write_file(temporary / "README.md", [model_card.encode("utf-8")])


def _check_biases(config: ModelConfig, read: Callable[[str], Tensor]) -> None:
    if config.balance != "bias" or config.is_dense:
        return
    moved = [layer for layer in range(config.n_layers) if read(f"blocks.{layer}.feed_forward.router.expert_bias").any()]
    if moved:
        raise InputError(
            f"model.balance: bias cannot be exported as Mixtral: the balancing bias of {len(moved)} of "
            f"{config.n_layers} layers changes which experts are chosen, and Mixtral has none; train with "
            "model.balance=loss"
        )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Write the tokenizer as a class that old and new versions know; it adds no tokens to a text, as ours does not."""
    values = json.loads(tokenizer.to_json())
    if any(tokenizer.template()):
        values["post_processor"] = None
    _write_json(folder / "tokenizer.json", values)
    end = tokenizer.end_of_text
    special = {"content": end, "special": True}
    special |= dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "pad_token": end,
            "unk_token": None,
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.max_seq_len,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(tokenizer.end_of_text_id): special},
        },
    )
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text_id)
    _write_json(folder / "generation_config.json", ids)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_file(path, [json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8"), b"\n"])
