"""Weights to start a new run with (--init-from): from a run, a checkpoint or a Hugging Face folder.

A dense model's weights can start a mixture of experts (``upcycle.py``).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moe_gpt.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig
from moe_gpt.config.yaml import to_plain
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.interop import hugging_face
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.adapters import tensors_of
from moe_gpt.training.saving.checkpoint import (
    copy_weights,
    read_config,
    read_state,
    read_tokenizer,
    read_weights,
)
from moe_gpt.training.saving.manifest import FILES
from moe_gpt.training.saving.own_code import router_for
from moe_gpt.training.saving.saved_model import verified
from moe_gpt.training.saving.upcycle import starts_as_same_function, upcycle

_ANY_CONTEXT = ("max_seq_len", "rope_theta")
_TRAINING_ONLY = ("router_noise", "capacity_factor", "bias_update_rate", "init_std", "mup_base")
_ROUTING = ("n_experts", "top_k", "normalize_topk", "balance")


class InitialWeights(NamedTuple):
    """A trained model that a new run starts with. Its weights are read later."""

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    tokenizer_config: TokenizerConfig
    """The settings that give this tokenizer."""
    read: Callable[[], dict[str, Tensor]]
    """Returns the weights by our names."""
    make_router: MakeRouter = Router
    """The class of their routers."""
    data: DataConfig | None = None
    """The text that they were trained on; None where nobody recorded it."""
    sees: bool = False
    """Whether they are the text model of one that sees, whose cross-attention and encoder stay behind."""

    def is_upcycled_into(self, config: ModelConfig) -> bool:
        """Whether these weights are dense and the config is not, so that every expert starts as a copy."""
        return self.model.is_dense and not config.is_dense

    def copy_into(self, model: MoEGPT) -> None:
        """Copy the weights into a model whose config ``check_fits`` accepted.

        Tensors without a counterpart keep their initial values: the routers of an upcycled model, routers of another
        class, a new balancing bias.
        """
        tensors = self.read()
        if self.is_upcycled_into(model.config):
            tensors = upcycle(tensors, model.config)
        own, is_new = tensors_of(model), ".router.expert_bias"
        if self.model.is_dense or model.make_router is not self.make_router:
            tensors, is_new = _without_routers(tensors), ".router."
        tensors |= {name: own[name] for name in own.keys() - tensors.keys() if is_new in name}
        copy_weights(model, tensors, str(self.path))


def _without_routers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".router." not in name}


def open_initial_weights(
    path: str | Path, max_seq_len: int | None, make_router: MakeRouter | None = None
) -> InitialWeights:
    """Open the run folder, checkpoint or Hugging Face folder of ``--init-from``.

    Args:
        max_seq_len: the longest context that the new run uses; None takes a folder's own.
        make_router: the user's router that the model was trained with, if any.

    Raises:
        FileNotFoundError: if there is neither a complete checkpoint nor a config.json.
        InputError: if the checkpoint is damaged, or ``hugging_face.load`` refuses the folder.
    """
    if hugging_face.is_model_folder(path):
        folder = Path(path)
        tokenizer = hugging_face.load_tokenizer(folder)
        return InitialWeights(
            path=folder,
            model=hugging_face.check(folder, max_seq_len),
            tokenizer=tokenizer,
            tokenizer_config=TokenizerConfig(file=str(folder / "tokenizer.json"), end_of_text=tokenizer.end_of_text),
            read=lambda: tensors_of(hugging_face.load(folder, max_seq_len)),
        )
    checkpoint = verified(path, FILES)
    config, router = read_config(checkpoint), read_state(checkpoint)["router"]
    make_router = router_for(router, make_router, str(checkpoint)) if router else Router
    return InitialWeights(
        path=checkpoint,
        model=config.model,
        tokenizer=read_tokenizer(checkpoint, config.data.tokenizer.end_of_text),
        tokenizer_config=config.data.tokenizer,
        read=lambda: read_weights(checkpoint, config.model, make_router),
        make_router=make_router,
        data=config.data,
        sees=config.see is not None,
    )


def check_fits(initial: InitialWeights, config: RunConfig) -> None:
    """Check that the run's model computes the same function; context length and training settings may differ.

    Raises:
        InputError: naming every setting that differs, and the overrides that would make them agree.
    """
    differences = list(_differences(initial, config))
    problems = [f"{key} is {there!r} in that model, got {here!r}" for key, there, here in differences]
    if problems:
        overrides = [f"{key}={json.dumps(there, ensure_ascii=False)}" for key, there, _ in differences]
        raise InputError(
            f"--init-from {initial.path} needs a config with the same model and tokenizer; these settings differ\n"
            + "\n".join(problems)
            + f"\nto match that model, add: {shlex.join(overrides)}"
        )
    if initial.is_upcycled_into(config.model) and not starts_as_same_function(config.model):
        raise InputError(
            "model.normalize_topk must be true to start from a dense model, got false, because the weights of a "
            "token's equal experts must sum to 1"
        )


def _differences(initial: InitialWeights, config: RunConfig) -> Iterator[tuple[str, object, object]]:
    """Yield each key that must agree but differs, with its value in the weights and in the run."""
    yield from _differences_of_models(initial, config)
    saved, wanted = initial.tokenizer_config, config.data.tokenizer
    if wanted.file and wanted.file != saved.file:
        if Tokenizer.load(wanted.file, wanted.end_of_text).to_json() == initial.tokenizer.to_json():
            return
    elif saved.file:
        wanted = dataclasses.replace(wanted, vocab_size=saved.vocab_size)  # a file has its own size
    for key in to_plain(saved):
        if getattr(saved, key) != getattr(wanted, key):
            yield f"data.tokenizer.{key}", getattr(saved, key), getattr(wanted, key)


def _differences_of_models(initial: InitialWeights, config: RunConfig) -> Iterator[tuple[str, object, object]]:
    there, here = to_plain(initial.model), to_plain(config.model)
    here["vocab_size"] = here["vocab_size"] or there["vocab_size"]  # null takes the weights' size
    ignored = _may_differ(initial, config.model)
    for key in there:
        if key not in ignored and there[key] != here[key]:
            yield f"model.{key}", there[key], here[key]


def _may_differ(initial: InitialWeights, config: ModelConfig) -> set[str]:
    """Return the settings that may differ between the weights and a model that starts with them."""
    keys = {*_ANY_CONTEXT, *_TRAINING_ONLY}
    if initial.is_upcycled_into(config):
        keys.update(_ROUTING)
    if initial.model.balance != "bias":  # a new bias starts at zero, which changes nothing
        keys.add("balance")
    return keys
