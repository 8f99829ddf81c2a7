"""Print loss, perplexity and bits per byte on held-out text: python scripts/evaluate.py runs/tiny."""

from __future__ import annotations

import argparse
import sys

from moe_gpt.cli import count_argument, run_script


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="a run folder means its newest checkpoint")
    parser.add_argument("--max-tokens", type=count_argument, help="per source (default: the run's validation_tokens)")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="default: auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    return parser.parse_args()


def main() -> None:
    """Score the run's sources."""
    arguments = parse_arguments()

    from moe_gpt.data.prepare import prepare_data
    from moe_gpt.device import pick_device, pick_precision, tune_process
    from moe_gpt.train.checkpoint import load_model
    from moe_gpt.train.evaluation import Evaluator, format_scores

    device = pick_device(arguments.device)
    tune_process()
    loaded = load_model(arguments.model, device)
    config, notes = loaded.config, sys.stderr
    print(f"{loaded.path}, {device}", file=notes)
    data = prepare_data(config.data, loaded.tokenizer, say=lambda text: print(text, file=notes))
    evaluator = Evaluator(
        data.sources,
        loaded.tokenizer,
        max(stage.seq_len for stage in config.schedule.stages),
        arguments.max_tokens or config.data.validation_tokens,
        config.train.micro_batch_tokens,
    )
    print(format_scores(evaluator(loaded.model, pick_precision(arguments.precision, device))))


if __name__ == "__main__":
    run_script(main)
