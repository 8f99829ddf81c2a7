"""Continue a prompt: python scripts/generate.py runs/tiny --prompt "def "."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from moe_gpt.commands.cli import ArgumentParser, count_argument


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder (its newest checkpoint), a checkpoint, or a Hugging Face folder (Mixtral, Mistral, Llama)",
    )
    parser.add_argument("--prompt", default="", help="the text to continue; the model sees exactly its tokens")
    parser.add_argument(
        "--bos",
        action="store_true",
        help="put end-of-text before the prompt, as before a document (a Hugging Face tokenizer that starts every "
        "text with a token of its own, such as <s>, does so anyway)",
    )
    parser.add_argument("--max-new-tokens", type=count_argument, default=200, help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest tokens; 0 from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that sum to P (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="default: fp32 on a CPU, else auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    return parser.parse_args()


def main() -> None:
    """Write the prompt and what follows it to stdout."""
    arguments = parse_arguments()

    from moe_gpt.inference.generate import SamplingConfig, generate
    from moe_gpt.interop import hugging_face
    from moe_gpt.ops.device import pick_device, pick_precision, tune_process
    from moe_gpt.training.saving.saved_model import LoadedRun, load_model

    sampling = SamplingConfig(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    device = pick_device(arguments.device)
    tune_process(device)
    precision = pick_precision(arguments.precision or ("fp32" if device.type == "cpu" else "auto"), device)
    loaded: hugging_face.LoadedFolder | LoadedRun
    start: list[int] = []
    if hugging_face.is_model_folder(arguments.model):
        loaded = hugging_face.load_with_tokenizer(arguments.model, device)
        start = loaded.text_start
    else:
        loaded = load_model(arguments.model, device)
    print(f"{loaded.path}, {device}, {precision}", file=sys.stderr)
    tokenizer = loaded.tokenizer
    prompt = (start or [tokenizer.end_of_text_id] * arguments.bos) + tokenizer.encode(arguments.prompt)
    ids = generate(
        loaded.model,
        prompt,
        arguments.max_new_tokens,
        sampling,
        arguments.seed,
        tokenizer.end_of_text_id,
        precision,
    )
    written = list(prompt)
    pieces = tokenizer.decode_stream(_remember(ids, written), context=prompt)
    first = next(pieces, "")  # a prompt that cannot be used fails here, before anything is printed
    print(arguments.prompt + first, end="", flush=True)
    for text in pieces:
        print(text, end="", flush=True)
    print()
    if len(written) == loaded.model.config.max_seq_len:
        print(f"stopped: the context of {len(written)} tokens is full", file=sys.stderr)


def _remember(ids: Iterator[int], written: list[int]) -> Iterator[int]:
    for token in ids:
        written.append(token)
        yield token
