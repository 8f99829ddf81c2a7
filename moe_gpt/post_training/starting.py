"""What a stage after pre-training begins with: a model, its tokenizer, and the text that it was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from moe_gpt.config import DataConfig, ModelConfig, RunConfig
from moe_gpt.config.section import Section
from moe_gpt.data.prepare import PreparedData, prepare_data
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.distributed.process import read_launch
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.chat import SPECIAL_TOKENS, TURN_END, TURN_START, mark
from moe_gpt.training.saving.checkpoint import read_config, read_state
from moe_gpt.training.saving.initial_weights import open_initial_weights
from moe_gpt.training.saving.vocabulary import grow
from moe_gpt.training.stage import Say, Start

_LEAST_HELD_OUT = 0.05
"""Share of the modules that built-in sets hold out where pre-training held out nothing, or nobody knows what."""
_HELD_OUT = 0.1
"""Share of the pairs or prompts of files that are held out."""
_Section = TypeVar("_Section", bound=Section)
_Item = TypeVar("_Item")


def present(value: _Item | None) -> _Item:
    """Return a value that is there, because of the run's stage or because ``settle`` has made sure of it."""
    assert value is not None
    return value


def settle(config: RunConfig, start: Start, say: Say, grows: bool = False) -> tuple[RunConfig, Start]:
    """Give the config what it leaves out of the model and the text.

    Args:
        config: of a stage after pre-training.
        start: with the weights of ``--init-from``, or a checkpoint to resume.
        say: is told of new tokens that cannot learn.
        grows: also give the weights rows for the special tokens of conversations.

    Raises:
        InputError: without weights to start with, where rows are longer than the model's context, or for adapters on
            several processes.
    """
    known = start.vocab_size
    if start.saved:
        saved = read_config(start.saved)
        config = completed(config, saved.model, saved.data)
    elif start.initial is None:
        raise InputError("fine-tuning needs --init-from: a run, a checkpoint or a Hugging Face folder to start with")
    else:
        initial = grow(start.initial, SPECIAL_TOKENS, config.train.seed) if grows else start.initial
        start = start._replace(initial=initial, tokenizer=initial.tokenizer, vocab_size=initial.model.vocab_size)
        is_known = initial.data or config.data.sources != DataConfig().sources
        text = initial.data or DataConfig(validation_fraction=config.data.validation_fraction if is_known else 0.0)
        text = dataclasses.replace(text, tokenizer=initial.tokenizer_config)
        config = completed(config, initial.model, text)
    _check_adapters(config, start.vocab_size != known, say)
    longest, row_tokens = config.model.max_seq_len, max(stage.seq_len for stage in config.schedule.stages)
    if row_tokens > longest:
        raise InputError(
            f"schedule.stages: seq_len must be at most the model's max_seq_len={longest}, got {row_tokens}"
        )
    return config, start


def _check_adapters(config: RunConfig, grown: bool, say: Say) -> None:
    if config.adapters and (n_processes := read_launch(os.environ).size) > 1:
        raise InputError(f"adapters learn in one process, got {n_processes}; start it without torchrun")
    if config.adapters and not config.adapters.also_train and grown:
        say(
            "note: the vocabulary gets rows for the tokens of conversations, which do not learn with adapters alone; "
            'add adapters.also_train=["^embedding","^output"]'
        )


def completed(config: RunConfig, model: ModelConfig, data: DataConfig) -> RunConfig:
    """Return the config of a stage with a model and data where it leaves the defaults."""
    return dataclasses.replace(
        config, model=_with_defaults(config.model, model), data=_with_defaults(config.data, data)
    )


def _with_defaults(given: _Section, otherwise: _Section) -> _Section:
    """Return a section with the values of another one where the default was left."""
    default = type(given)()
    kept = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    return dataclasses.replace(otherwise, **{k: v for k, v in kept.items() if v != getattr(default, k)})


def text_of_pretraining(config: RunConfig, tokenizer: Tokenizer, say: Say, learns: bool = False) -> tuple:
    """Return the sources of pre-training, as its own tokenizer made them into tokens; none if they cannot be read.

    Where nothing is held out, a stage that ``learns`` from them still gets those that the config names.
    """
    is_named = config.data.sources != DataConfig().sources  # else nobody may have named any
    if not config.data.validation_fraction and not (learns and is_named):
        return ()
    try:
        return prepare_data(config.data, tokenizer.without_added_tokens(SPECIAL_TOKENS), say).sources
    except InputError as error:
        say(f"note: forgetting is not measured, because the text of pre-training cannot be read: {error}")
        return ()


def describe_forgetting(data: PreparedData) -> str:
    """Return a line for people: on what forgetting is measured."""
    names = ", ".join(source.config.name for source in data.sources if len(source.validation))
    if not names:
        return "note       forgetting is not measured: no held-out text of pre-training is known"
    return f"           forgetting is measured on held-out {names}"


def held_out_fraction(data: DataConfig) -> float:
    """Return the share of modules that built-in sets hold out."""
    return data.validation_fraction or _LEAST_HELD_OUT


def require_marks(tokenizer: Tokenizer, what: str) -> int:
    """Return the token that ends a turn; raise ``InputError`` for a model that has none."""
    if tokenizer.special_id(TURN_START) is None:
        raise InputError(f"{what} need a model with a chat template; fine-tune it first (a config with sft)")
    return mark(TURN_END, tokenizer)


def split_items(items: Sequence[_Item], text_of: Callable[[_Item], str]) -> tuple[list[_Item], list[_Item]]:
    """Return the items of files for training, and a tenth that is held out by a hash; none where too few are there."""
    sides: tuple[list[_Item], list[_Item]] = ([], [])
    for item in items:
        digest = hashlib.sha256(text_of(item).encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64].append(item)
    return sides if sides[0] else (sides[1], [])


def model_at_start(start: Start) -> MoEGPT:
    """Return the model that a run of a later stage began with, in evaluation mode; a resumed run knows where it is.

    Raises:
        FileNotFoundError: where it is not there any more.
        InputError: where it is damaged.
    """
    initial = start.initial
    if initial is None:
        assert start.saved, "a run begins with weights, or it is resumed"
        initial = open_initial_weights(read_state(start.saved)["initialised_from"], None)
    with torch.random.fork_rng([]):
        model = MoEGPT(initial.model, initial.make_router)
    initial.copy_into(model)
    return model.eval()
