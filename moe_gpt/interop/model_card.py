"""The README.md of an exported model: the template ``model_card.md.jinja``, filled in from the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

from moe_gpt.config import ModelConfig, RunConfig, SourceConfig
from moe_gpt.measure.parameters import count_parameters


class Training(NamedTuple):
    """How a model was trained, as its checkpoint records it."""

    config: RunConfig
    step: int
    tokens_seen: int
    scores: Mapping[str, Mapping[str, float]]
    """Per source, ``ce_loss`` in nats per token and ``bits_per_byte`` on held-out text; empty if not evaluated."""
    started_from: str | None = None
    """The model that the initial weights came from."""
    trained_length: int | None = None
    """The longest sequence of training, if it is known."""


def model_card(name: str, training: Training, dtype: str, licence: str, mllama_width: int | None = None) -> str:
    """Return a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        name: of the model.
        training: the run that made the model.
        dtype: of the weights in the files.
        licence: an identifier that the hub knows, or "unknown".
        mllama_width: of the features that a model with cross-attention takes; None for a model of text.
    """
    from huggingface_hub import CardData, RepoCard  # slow to import

    config, model = training.config, training.config.model
    front_matter = CardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moe_gpt", *_kind(model, mllama_width)],
    )
    card = RepoCard.from_template(
        front_matter,
        template_str=resources.files(__package__).joinpath("model_card.md.jinja").read_text(encoding="utf-8"),
        name=name,
        training=training,
        config=config,
        model=model,
        counts=count_parameters(dataclasses.replace(model, attention_sharing=1)),  # files repeat shared attention
        dtype=dtype,
        mllama_width=mllama_width,
        json=json.dumps,
        sources=[(source.name, _origin(source), _share(source)) for source in config.data.sources],
        pictures=[
            source.builtin or _names(source.files or ()) for source in (config.see.sources if config.see else ())
        ],
    )
    return card.content + "\n"


def _kind(model: ModelConfig, mllama_width: int | None) -> list[str]:
    if mllama_width:
        return ["mllama"]
    return ["llama"] if model.is_dense else ["moe", "mixtral"]


def _origin(source: SourceConfig) -> str:
    if source.builtin:
        return {"prose": "Python's documentation", "code": "Python's standard library"}[source.builtin]
    if source.files:
        return _names(source.files)
    return "dataset: " + ", ".join(filter(None, (source.dataset, source.subset, source.split, source.revision)))


def _share(source: SourceConfig) -> str:
    return f"weight {source.weight:g}" if source.weight else f"{source.passes:g} x per big epoch"


def _names(files: str | tuple[str, ...]) -> str:
    """Return the names of files without their folders, which are the user's own."""
    patterns = (files,) if isinstance(files, str) else files
    return "files: " + ", ".join(pattern.replace("\\", "/").rpartition("/")[2] for pattern in patterns)
