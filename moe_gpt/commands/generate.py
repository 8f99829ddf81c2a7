"""``moe-gpt generate``: continue a prompt."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from moe_gpt.commands.options import Device, Precision, Quantize, Switch, Whole, WholeOrZero, Words, flat, read_as
from moe_gpt.commands.speculation import NO_SPECULATION, SpeculationOptions, make_draft
from moe_gpt.config.section import AtMostOne, NonNegative, Seed
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel
    from moe_gpt.commands.evaluate import EvaluateOptions
    from moe_gpt.commands.serve import ServeOptions
    from moe_gpt.inference.speculation import Draft
    from moe_gpt.post_training.eyes import Opened

PROMPT, SAMPLING, PLACE = (Group.create_ordered(name) for name in ("Prompt", "Sampling", "Model"))
_LONGEST_PROMPT = 10_000_000  # a device such as /dev/zero has no end


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledModelOptions:
    """How to sample, and where and how the model computes."""

    top_k: Annotated[WholeOrZero, Parameter(group=SAMPLING)] = 0
    """Sample from this many most likely tokens; 0 samples from all."""
    top_p: Annotated[AtMostOne, read_as(AtMostOne), Parameter(group=SAMPLING)] = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: Annotated[Seed, read_as(Seed), Parameter(group=SAMPLING)] = 0
    """Seed of the sampling."""
    max_seq_len: Annotated[Whole | None, Parameter(group=PLACE)] = None
    """Context in tokens to use instead of the model's own."""
    router: Annotated[str | None, Parameter(group=PLACE)] = None
    """Your own router, as FILE.py:NAME, if the model was trained with one."""
    precision: Annotated[Precision | None, Parameter(group=PLACE)] = None
    """Compute type; fp32 on a CPU, else auto, by default."""
    quantize: Annotated[Quantize | None, Parameter(group=PLACE)] = None
    """Weights in fewer bits: int8, int4. Their products take bf16; --precision is for the rest (docs/quantised.md)."""
    device: Annotated[Device, Parameter(group=PLACE)] = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


DEFAULTS = SampledModelOptions()


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(SampledModelOptions):
    """Prompt, sampling, router and device."""

    prompt: Annotated[str | None, Parameter(group=PROMPT)] = None
    """The text to continue. Only the token that --bos describes may stand before it. Without a prompt, on a terminal,
    each line that you type is continued."""
    image: Annotated[Words, Parameter(group=PROMPT)] = ()
    """A picture for a model that sees: at a marker `<image>` of the prompt, or before the prompt where it has none.
    Repeat the option for several."""
    prompt_file: Annotated[Path | None, Parameter(group=PROMPT)] = None
    """A file whose text is the prompt."""
    bos: Annotated[Switch, Parameter(group=PROMPT)] = False
    """Put end-of-text before the prompt, as before a document. A Hugging Face tokenizer with a start token of its own,
    such as `<s>`, always puts that token there."""
    special_tokens: Annotated[Switch, Parameter(group=PROMPT)] = False
    """Read special tokens that the prompt spells, such as `<|fim_prefix|>`, as those tokens instead of as text."""
    samples: Annotated[Whole, Parameter(group=PROMPT)] = 1
    """Number of continuations to write, each with a seed of its own."""
    max_new_tokens: Annotated[Whole, Parameter(group=SAMPLING)] = 200
    """Tokens to write at most."""
    context: Annotated[Whole | None, Parameter(group=SAMPLING)] = None
    """Positions of prompt and continuation together; by default the longest sequence that the run was trained on."""
    temperature: Annotated[NonNegative, read_as(NonNegative), Parameter(group=SAMPLING)] = 0.8
    """Divisor of the logits; 0 chooses the most likely token each time."""


def generate(
    model: str,
    *,
    options: GenerateOptions = GenerateOptions(),
    speculation: SpeculationOptions = NO_SPECULATION,
) -> None:
    """Write a prompt and its continuation by a model to stdout.

    Args:
        model: A run (its newest checkpoint), a checkpoint, or a folder: quantised, or Mixtral, Mistral or Llama.
    """
    prompt = find_prompt(options)

    loaded = load_as_told(model, options)
    draft = make_draft(speculation, loaded, 1)
    if prompt is not None or not sys.stdin.isatty():
        write_samples(loaded, prompt or "", options, draft)
        return
    print("type a prompt and press return; an empty line ends", file=sys.stderr)
    while prompt := sys.stdin.readline().rstrip("\n"):
        write_samples(loaded, prompt, options, draft)


def load_as_told(model: str, options: SampledModelOptions | EvaluateOptions | ServeOptions) -> LanguageModel:
    """Load the model of a command, and say on stderr where and how it computes."""
    from moe_gpt.api.loaded import load
    from moe_gpt.training.saving.own_code import find_router

    loaded = load(
        model,
        options.device,
        make_router=find_router(options.router) if options.router else None,
        precision=options.precision,
        max_seq_len=options.max_seq_len,
        quantize=options.quantize,
    )
    print(wrap(loaded.setting), file=sys.stderr)
    return loaded


def show(loaded: LanguageModel, image: str) -> Opened:
    """Open a picture, and say on stderr what of it is not seen."""
    picture = loaded.eyes.open(image)
    for remark in picture.remarks:
        print(wrap(f"note: {image}: {remark}"), file=sys.stderr)
    return picture


def find_prompt(options: GenerateOptions) -> str | None:
    """Return the prompt of --prompt or of --prompt-file; None without either.

    Raises:
        InputError: where both were given, or the file is not UTF-8 text or is too long.
    """
    if options.prompt_file is None:
        return "" if options.prompt is None and options.bos else options.prompt
    if options.prompt is not None:
        raise InputError(f"--prompt or --prompt-file: give one, got both (--prompt-file {options.prompt_file})")
    try:
        with open(options.prompt_file, encoding="utf-8-sig") as file:
            text = file.read(_LONGEST_PROMPT + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {options.prompt_file} is not UTF-8 text: {error}") from None
    if len(text) > _LONGEST_PROMPT:
        raise InputError(f"--prompt-file {options.prompt_file} must have at most {_LONGEST_PROMPT:,} characters")
    return text


def write_samples(loaded: LanguageModel, prompt: str, options: GenerateOptions, draft: Draft | None = None) -> None:
    """Write the prompt with each continuation of it, as it is made."""
    from moe_gpt.inference.sampling import SamplingConfig

    sampling = SamplingConfig(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    pictures, limit = [show(loaded, image) for image in options.image], options.context or loaded.context
    ids, beside = loaded.look(prompt, pictures, options.bos, options.special_tokens)
    _warn_of_the_prompt(loaded, prompt, options)
    for index in range(options.samples):
        written = list(ids)
        new = loaded.continue_ids(ids, options.max_new_tokens, sampling, options.seed + index, limit, draft, beside)
        pieces = loaded.require_tokenizer().decode_stream(_remember(new, written), context=ids)
        first = next(pieces, "")  # a prompt that cannot be used fails here, before anything is printed
        if options.samples > 1:
            print(f"--- sample {index + 1} ---")
        print(prompt + first, end="", flush=True)
        for text in pieces:
            print(text, end="", flush=True)
        print()
        if len(written) == limit:
            print(f"stopped: the context of {limit} tokens is full", file=sys.stderr)


def _warn_of_the_prompt(loaded: LanguageModel, prompt: str, options: GenerateOptions) -> None:
    """Say where special tokens are read as text, and where the context is longer than in training."""
    spelled = loaded.require_tokenizer().spelled_special_tokens(prompt)
    if spelled and not options.special_tokens:
        text = f"note: {', '.join(spelled)} in the prompt is read as text; --special-tokens reads it as a token"
        print(wrap(text), file=sys.stderr)
    warn_of_context(loaded, options.context)


def warn_of_context(loaded: LanguageModel, context: int | None) -> None:
    """Say on stderr that a context is longer than the sequences of training; refuse one beyond the model."""
    from moe_gpt.inference.generate import checked_context

    checked_context(loaded.model, context)
    trained = loaded.trained_length
    if trained and (context or 0) > trained:
        text = f"WARNING: the run was trained on at most {trained} positions; at {context}, its loss is extrapolation"
        print(wrap(text), file=sys.stderr)


def _remember(ids: Iterator[int], written: list[int]) -> Iterator[int]:
    for token in ids:
        written.append(token)
        yield token
