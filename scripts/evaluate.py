"""Print loss, perplexity and bits per byte on held-out text: python scripts/evaluate.py runs/tiny."""

from __future__ import annotations

import argparse
import sys

from moe_gpt.cli import ArgumentParser, count_argument, run_script


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="a run folder means its newest checkpoint")
    parser.add_argument(
        "--max-tokens", type=count_argument, help="per source, whole sequences (default: validation_tokens)"
    )
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="default: auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    return parser.parse_args()


def main() -> None:
    """Score the run's sources."""
    arguments = parse_arguments()

    from moe_gpt.data.prepare import prepare_data
    from moe_gpt.device import pick_device, pick_precision, tune_process
    from moe_gpt.train.checkpoint import load_model, read_state
    from moe_gpt.train.evaluation import format_scores
    from moe_gpt.train.setup import build_evaluator

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    device = pick_device(arguments.device)
    tune_process(device)
    precision = pick_precision(arguments.precision, device)
    loaded = load_model(arguments.model, device)
    note(f"{loaded.path}, {device}, {precision}")
    data = prepare_data(loaded.config.data, loaded.tokenizer, say=note)
    if data.fingerprint != read_state(loaded.path)["data_fingerprint"]:
        note("note: the text of the sources is not what it was in training, so the held-out part differs too")
    evaluator = build_evaluator(loaded.config, data, arguments.max_tokens)
    print(format_scores(evaluator(loaded.model, precision)))


if __name__ == "__main__":
    run_script(main)
