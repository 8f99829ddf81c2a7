"""Print loss, perplexity and bits per byte on held-out text, or on any: python scripts/evaluate.py runs/tiny."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from moe_gpt.commands.cli import ArgumentParser, count_argument, positive_argument
from moe_gpt.errors import InputError

if TYPE_CHECKING:
    import torch

    from moe_gpt.ops.device import Precision


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder (its newest checkpoint) or a checkpoint; with --files also a Hugging Face folder",
    )
    parser.add_argument(
        "--files",
        action="append",
        metavar="GLOB",
        help="score these files instead of the run's held-out text (.jsonl, .parquet, .csv: column text); repeatable",
    )
    parser.add_argument(
        "--stride", type=count_argument, help="with --files: tokens that the window moves (default: half the context)"
    )
    parser.add_argument(
        "--by-position", action="store_true", help="held-out loss by place in the sequence, instead of its mean"
    )
    parser.add_argument("--context", type=count_argument, help="held-out sequences of this length (default: the run's)")
    parser.add_argument(
        "--rope-theta", type=positive_argument, help="base of the rotary frequencies (default: the run's)"
    )
    parser.add_argument(
        "--max-tokens", type=count_argument, help="held-out tokens per source (default: validation_tokens)"
    )
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="default: auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    return parser.parse_args()


def main() -> None:
    """Score the run's sources, or files."""
    arguments = parse_arguments()
    if arguments.stride and not arguments.files:
        raise InputError(f"--stride is for --files, got --stride {arguments.stride} without it")
    for name in ("max_tokens", "context", "rope_theta", "by_position"):
        if arguments.files and getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')} is for held-out text, got it with --files")

    from moe_gpt.ops.device import pick_device, pick_precision, tune_process

    device = pick_device(arguments.device)
    tune_process(device)
    precision = pick_precision(arguments.precision, device)
    score = score_files if arguments.files else score_held_out
    print(score(arguments, device, precision))


def score_held_out(arguments: argparse.Namespace, device: torch.device, precision: Precision) -> str:
    """Return a table with a row per source of the run."""
    from moe_gpt.data.prepare import prepare_data
    from moe_gpt.training.evaluation import format_positions, format_scores
    from moe_gpt.training.saving.checkpoint import read_state
    from moe_gpt.training.saving.saved_model import load_model
    from moe_gpt.training.setup import build_evaluator

    loaded = load_model(arguments.model, device)
    note(f"{loaded.path}, {device}, {precision}")
    data = prepare_data(loaded.config.data, loaded.tokenizer, say=note)
    if data.fingerprint != read_state(loaded.path)["data_fingerprint"]:
        note("note: the text of the sources is not what it was in training, so the held-out part differs too")
    model, context = loaded.model, arguments.context
    model.config = dataclasses.replace(
        model.config,
        max_seq_len=max(context or 0, model.config.max_seq_len),
        rope_theta=arguments.rope_theta or model.config.rope_theta,
    )
    evaluator = build_evaluator(loaded.config, data, arguments.max_tokens, context)
    if arguments.by_position:
        return format_positions(evaluator.by_position(model, precision))
    return format_scores(evaluator(model, precision))


def score_files(arguments: argparse.Namespace, device: torch.device, precision: Precision) -> str:
    """Return a table with a row per glob."""
    from moe_gpt.config import SourceConfig
    from moe_gpt.data.corpus import iterate_documents
    from moe_gpt.interop import hugging_face
    from moe_gpt.training.evaluation import format_scores
    from moe_gpt.training.saving.saved_model import LoadedRun, load_model
    from moe_gpt.training.score_text import score_documents

    loaded: hugging_face.LoadedFolder | LoadedRun
    if hugging_face.is_model_folder(arguments.model):
        loaded = hugging_face.load_with_tokenizer(arguments.model, device)
    else:
        loaded = load_model(arguments.model, device)
    stride = arguments.stride or max(1, loaded.model.config.max_seq_len // 2)
    note(f"{loaded.path}, {device}, {precision}, windows of {loaded.model.config.max_seq_len} tokens every {stride}")
    scores = {}
    for pattern in arguments.files:
        documents = (document.text for document in iterate_documents(SourceConfig(name="files", files=pattern)))
        scores[pattern] = score_documents(loaded.model, loaded.tokenizer, documents, precision, stride)
    return format_scores(scores)


def note(text: str) -> None:
    """Tell a person what is not part of the result."""
    print(text, file=sys.stderr)
