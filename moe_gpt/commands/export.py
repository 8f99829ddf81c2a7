"""Write a model as a Hugging Face folder: python scripts/export.py runs/tiny exported/tiny."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from moe_gpt.commands.cli import ArgumentParser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="A model with experts becomes a MixtralForCausalLM, a dense one a LlamaForCausalLM; transformers, vLLM "
        "and llama.cpp open them without this package (docs/running-elsewhere.md).",
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="a run folder means its newest checkpoint")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="new or empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument(
        "--license",
        type=_licence,
        default="unknown",
        help="identifier for the model card, such as apache-2.0 (default: unknown)",
    )
    return parser.parse_args()


def _licence(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", text):
        raise argparse.ArgumentTypeError(f"must be an identifier such as apache-2.0, got {text!r}")
    return text


def main() -> None:
    """Export, then say what was written and how to use it."""
    arguments = parse_arguments()

    from moe_gpt.files.tensors import TensorReader
    from moe_gpt.interop import hugging_face
    from moe_gpt.interop.model_card import Training, model_card
    from moe_gpt.measure.parameters import count_parameters
    from moe_gpt.training.records.metrics import scores_at
    from moe_gpt.training.saving.saved_model import describe_model, open_checkpoint

    saved = open_checkpoint(arguments.model)
    config = saved.config
    training = Training(
        config,
        saved.step,
        saved.tokens_seen,
        scores_at(saved.run_dir / "metrics.jsonl", saved.step),
        describe_model(saved.initialised_from) if saved.initialised_from else None,
    )
    hugging_face.export(
        config.model,
        TensorReader([saved.weights_file]).read,
        arguments.folder,
        saved.tokenizer,
        hugging_face.DTYPES[arguments.dtype],
        config.loss.load_balancing_loss_weight,
        model_card(arguments.folder.absolute().name, training, arguments.dtype, arguments.license),
        keep_template=False,
    )
    architecture = "LlamaForCausalLM" if config.model.is_dense else "MixtralForCausalLM"
    n_bytes = sum(file.stat().st_size for file in arguments.folder.iterdir())
    print(f"{saved.path} -> {arguments.folder}: {architecture}, {arguments.dtype}, {n_bytes / 1e6:,.1f} MB")
    if config.model.attention_sharing > 1:
        total = count_parameters(config.model).total
        print(f"note: attention shared by layers is written once for each, so there are more than {total:,} parameters")
    if config.model.capacity_factor:
        print("note: model.capacity_factor dropped tokens in training only; the exported model drops none")
    start, end = saved.tokenizer.template()
    if start or end:
        spelled = " ".join(saved.tokenizer.spell(index) for index in (*start, *end))
        print(f"note: the exported tokenizer does not put {spelled} around texts, because training did not")
    print(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(arguments.folder)!r})")
