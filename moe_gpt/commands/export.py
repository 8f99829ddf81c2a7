"""``moe-gpt export``: write a model as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.options import Quantize, Switch, flat
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.interop.model_card import Training
    from moe_gpt.interop.tokenizer_files import Chat
    from moe_gpt.training.saving.saved_model import SavedModel


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How the folder is written."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the files."""
    quantize: Quantize | None = None
    """Write a folder of weights in fewer bits, int8 or int4, that only moe_gpt reads (docs/quantised.md)."""
    adapters: Switch = False
    """Write a run's adapters alone, as a folder of PEFT (docs/from-base-to-chat.md)."""
    license: str = "unknown"
    """License identifier for the model card, such as apache-2.0."""


def export(model: str, folder: Path, *, options: ExportOptions = ExportOptions()) -> None:
    """Write a model as a Hugging Face folder, and print how to use it.

    A model with experts becomes a MixtralForCausalLM, a dense one a LlamaForCausalLM. Transformers, vLLM and llama.cpp
    open them without moe_gpt (docs/running-elsewhere.md). A dense model that sees becomes a MllamaForCausalLM.

    Args:
        model: A run folder (its newest checkpoint) or a checkpoint; with --quantize also a Hugging Face folder.
        folder: The folder to write, new or empty.
    """
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", options.license):
        raise InputError(f"--license must be an identifier such as apache-2.0, got {options.license!r}")
    if options.quantize or options.adapters:
        (export_adapters if options.adapters else export_quantised)(model, folder, options)
        return

    from moe_gpt.training.saving.saved_model import open_checkpoint

    saved = open_checkpoint(model)
    _require_model_of_text(saved)
    if saved.config.see:
        _export_mllama(saved, folder, options)
        return
    is_chat = _export_text(saved, folder, options)
    print(f"next:\n  {_next_command(folder, is_chat)}")
    print(f"or, in Python with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def _export_text(saved: SavedModel, folder: Path, options: ExportOptions) -> bool:
    """Write a Mixtral or a Llama; return whether it can chat."""
    from moe_gpt.interop import hugging_face
    from moe_gpt.interop.model_card import model_card

    config, chat = saved.config, _chat_of(saved)
    hugging_face.export(
        config.model,
        saved.weights.read,
        folder,
        saved.tokenizer,
        hugging_face.DTYPES[options.dtype],
        config.loss.load_balancing_loss_weight,
        model_card(folder.absolute().name, _training_of(saved), options.dtype, options.license),
        keep_template=False,
        chat=chat,
    )
    _say(saved, folder, "LlamaForCausalLM" if config.model.is_dense else "MixtralForCausalLM", options.dtype)
    return chat is not None


def _export_mllama(saved: SavedModel, folder: Path, options: ExportOptions) -> None:
    """Write the text model and cross-attention of a run that sees, and say what it takes to use them."""
    from moe_gpt.interop import mllama_folder
    from moe_gpt.interop.hugging_face import DTYPES
    from moe_gpt.interop.model_card import model_card

    config, weights = saved.config, saved.weights
    assert config.see is not None
    mllama_folder.refuse_mixture(config.model, str(saved.path))
    features = weights.shape("cross.layers.0.attention.kv.weight")[1]
    layout = mllama_folder.Layout(config.model, features, config.see.every)
    card = model_card(folder.absolute().name, _training_of(saved), options.dtype, options.license, layout.width)
    mllama_folder.export(
        layout, weights.read, weights.shape, folder, saved.tokenizer, DTYPES[options.dtype], card, _chat_of(saved)
    )
    _say(saved, folder, "MllamaForCausalLM", options.dtype)
    for note in mllama_folder.notes(layout):
        print(wrap(f"note: {note}"))
    print(f"next, in Python with transformers: see {folder / 'README.md'}")


def _training_of(saved: SavedModel) -> Training:
    from moe_gpt.interop.model_card import Training
    from moe_gpt.training.records.metrics import scores_at
    from moe_gpt.training.saving.saved_model import describe_model

    scores = scores_at(saved.run_dir / "metrics.jsonl", saved.step)
    origin = describe_model(saved.initialised_from) if saved.initialised_from else None
    return Training(saved.config, saved.step, saved.tokens_seen, scores, origin, saved.trained_length)


def _chat_of(saved: SavedModel) -> Chat | None:
    """Return how conversations are written, for a model that chats."""
    from moe_gpt.interop.tokenizer_files import Chat
    from moe_gpt.post_training.chat import TEMPLATE, TRAINING_TEMPLATE, TURN_END, can_chat

    is_chat = can_chat(saved.config.stage, saved.tokenizer)
    return Chat(TEMPLATE, TRAINING_TEMPLATE, TURN_END) if is_chat else None


def _say(saved: SavedModel, folder: Path, architecture: str, dtype: str) -> None:
    print(f"{saved.path} -> {folder}: {architecture}, {dtype}, {_megabytes(folder)}")
    for note in notes(saved):
        print(wrap(f"note: {note}"))


def _next_command(folder: Path, is_chat: bool) -> str:
    return command_line("chat", folder) if is_chat else command_line("generate", folder, "--prompt", "def ")


def _require_model_of_text(saved: SavedModel) -> None:
    """Raise ``InputError`` for a model that other programs cannot run: with a router of one's own, or of rewards."""
    from moe_gpt.interop import hugging_face

    if saved.router:
        raise InputError(hugging_face.own_router_text(saved.router["name"]))
    if saved.config.reward:
        raise InputError(
            f"{saved.path} is a reward model: it scores answers (rl.reward_model), and has no text to export"
        )


def export_quantised(model: str, folder: Path, options: ExportOptions) -> None:
    """Write a model as a folder of quantised weights, and print how to use it."""
    from moe_gpt.api.loaded import load
    from moe_gpt.interop import quantised_folder
    from moe_gpt.post_training.chat import TEMPLATE, can_chat

    if (options.dtype, options.license) != (ExportOptions.dtype, ExportOptions.license):
        raise InputError("--dtype and --license are for a Hugging Face folder; leave them out with --quantize")
    loaded = load(model, "cpu", precision="fp32")
    settings = quantised_folder.Settings(
        kind=options.quantize,  # type: ignore[arg-type]
        model=loaded.config,
        end_of_text=loaded.tokenizer.end_of_text if loaded.tokenizer else None,
        text_start=loaded.text_start,
        trained_length=loaded.trained_length,
    )
    config, tokenizer = loaded.run_config, loaded.tokenizer
    template = TEMPLATE if config and tokenizer and can_chat(config.stage, tokenizer) else None
    quantised_folder.save(folder, loaded.model, settings, tokenizer, loaded.path, template)
    print(f"{loaded.path} -> {folder}: {options.quantize}, {_megabytes(folder)}, for moe_gpt alone")
    print(f"next:\n  {_next_command(folder, template is not None)}")


def export_adapters(model: str, folder: Path, options: ExportOptions) -> None:
    """Write a run's adapters as a folder of PEFT, and print how to use it."""
    from moe_gpt.post_training.peft_folder import save_adapters
    from moe_gpt.training.saving.saved_model import load_adapted, open_checkpoint

    if options != ExportOptions(adapters=True):
        raise InputError("--dtype, --license and --quantize are for whole models; leave them out with --adapters")
    saved = open_checkpoint(model)
    if saved.config.adapters is None:
        raise InputError(f"{saved.path} has no adapters; leave --adapters out")
    _require_model_of_text(saved)
    if others := list(_learned_beside_adapters(saved)):
        raise InputError(
            f"{saved.path} learned more than its adapters: {', '.join(others)}; leave --adapters out, and they are "
            "merged into an export of the whole model"
        )
    save_adapters(load_adapted(saved), folder)
    print(f"{saved.path} -> {folder}: adapters of rank {saved.config.adapters.rank}, {_megabytes(folder)}")
    print(f"next:\n  {command_line('export', saved.initialised_from, 'BASE')}")
    load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('BASE'), {str(folder)!r})"
    print(f"then, in Python with peft and transformers: {load}")


def _learned_beside_adapters(saved: SavedModel) -> Iterator[str]:
    """Yield what a folder of adapters would lack."""
    from moe_gpt.training.saving.initial_weights import open_initial_weights

    config = saved.config
    yield from config.adapters.also_train if config.adapters else ()
    if config.model.balance == "bias":
        yield "the balancing bias"
    if open_initial_weights(str(saved.initialised_from), None).model.vocab_size != config.model.vocab_size:
        yield "rows of new special tokens"


def _megabytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:,.1f} MB"


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
