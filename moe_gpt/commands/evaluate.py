"""``moe-gpt evaluate``: loss, perplexity and bits per byte of held-out text, or of any files."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from moe_gpt.commands.generate import warn_of_context
from moe_gpt.commands.options import AboveZero, Device, Precision, Switch, Whole, Words, flat
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel
    from moe_gpt.config import RunConfig

FILES, HELD_OUT, PLACE = (Group.create_ordered(name) for name in ("Files", "The run's held-out text", "Model"))
_OF_FILES = ("stride", "text_field", "errors", "format", "max_seq_len")
_OF_HELD_OUT = ("by_position", "rope_theta", "max_tokens")


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The text to score, and the device."""

    files: Annotated[Words, Parameter(group=FILES)] = ()
    """Score these files (a path or a glob) instead of the run's held-out text."""
    text_field: Annotated[str | None, Parameter(group=FILES)] = None
    """The column that holds the text, in files with rows; text by default."""
    errors: Annotated[str | None, Parameter(group=FILES)] = None
    """Treatment of bytes that are not UTF-8: strict (default) or replace."""
    format: Annotated[str | None, Parameter(group=FILES)] = None
    """What the files are, where their names do not say it: text, lines, json, csv, tsv, parquet or arrow."""
    stride: Annotated[Whole | None, Parameter(group=FILES)] = None
    """Tokens by which the window advances; half the context by default."""
    max_seq_len: Annotated[Whole | None, Parameter(group=FILES)] = None
    """Context in tokens to use instead of the model's own."""
    by_position: Annotated[Switch, Parameter(group=HELD_OUT)] = False
    """Show the loss by position in the sequence instead of the mean loss."""
    rope_theta: Annotated[AboveZero | None, Parameter(group=HELD_OUT)] = None
    """Base of the rotary frequencies; the run's by default."""
    max_tokens: Annotated[Whole | None, Parameter(group=HELD_OUT)] = None
    """Tokens to score of each source; data.validation_tokens of the run by default."""
    context: Annotated[Whole | None, Parameter(group=PLACE)] = None
    """Length of the sequences; by default the longest that the run was trained on."""
    router: Annotated[str | None, Parameter(group=PLACE)] = None
    """Your own router, as FILE.py:NAME, if the model was trained with one."""
    precision: Annotated[Precision, Parameter(group=PLACE)] = "auto"
    """Compute type."""
    device: Annotated[Device, Parameter(group=PLACE)] = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""

    def check(self) -> None:
        """Check that options for files come with --files, and those for held-out text without.

        Raises:
            InputError: naming the option.
        """
        name = next((name for name in (_OF_HELD_OUT if self.files else _OF_FILES) if getattr(self, name)), None)
        if name:
            rule = "is for held-out text, and cannot be used with" if self.files else "needs"
            raise InputError(f"--{name.replace('_', '-')} {rule} --files")


def evaluate(model: str, *, options: EvaluateOptions = EvaluateOptions()) -> None:
    """Print a table with the loss of each source of a run, or of each of the files.

    Args:
        model: A run folder (its newest checkpoint) or a checkpoint; with --files also a Hugging Face folder.
    """
    options.check()

    from moe_gpt.api.loaded import load
    from moe_gpt.interop.hugging_face import is_model_folder
    from moe_gpt.training.saving.own_code import find_router
    from moe_gpt.training.saving.saved_model import resolve_checkpoint

    if not options.files and is_model_folder(model):
        resolve_checkpoint(model)  # its error names --files
    make_router = find_router(options.router) if options.router else None
    loaded = load(
        model, options.device, make_router=make_router, precision=options.precision, max_seq_len=options.max_seq_len
    )
    note(f"{loaded.path}, {loaded.model.embedding.weight.device}, {loaded.precision}")
    print(score_files(loaded, options) if options.files else score_held_out(loaded, options))


def _require_held_out_text(config: RunConfig) -> None:
    if not config.data.validation_fraction:
        raise InputError("this run holds out no text (data.validation_fraction=0); give other text with --files")


def score_held_out(loaded: LanguageModel, options: EvaluateOptions) -> str:
    """Return a table with a row for each source of the run."""
    from moe_gpt.data.prepare import prepare_data
    from moe_gpt.training.evaluation import format_positions, format_scores
    from moe_gpt.training.saving.checkpoint import read_state
    from moe_gpt.training.setup import build_evaluator

    config, model = loaded.run_config, loaded.model
    assert config, "a run has a config"
    _require_held_out_text(config)
    data = prepare_data(config.data, loaded.tokenizer, say=note)
    if data.fingerprint != read_state(loaded.path)["data_fingerprint"]:
        note("note: the text of the sources has changed since training, so the held-out part differs too")
    model.config = dataclasses.replace(
        model.config,
        max_seq_len=max(options.context or 0, model.config.max_seq_len),
        rope_theta=options.rope_theta or model.config.rope_theta,
    )
    warn_of_context(loaded, options.context)
    evaluator = build_evaluator(config, data, options.max_tokens, options.context or loaded.trained_length)
    if options.by_position:
        return format_positions(evaluator.by_position(model, loaded.precision))
    return format_scores(evaluator(model, loaded.precision))


def score_files(loaded: LanguageModel, options: EvaluateOptions) -> str:
    """Return a table with a row for each glob."""
    from moe_gpt.training.evaluation import format_scores

    context = options.context or loaded.context
    stride = options.stride or max(1, context // 2)
    note(f"the window has {context} tokens and advances by {stride}")
    warn_of_context(loaded, options.context)
    reading = {
        "text_field": options.text_field or "text",
        "errors": options.errors or "strict",
        "format": options.format or "auto",
    }
    try:
        return format_scores(
            {files: loaded.evaluate(Path(files), stride=stride, context=context, **reading) for files in options.files}
        )
    except InputError as error:
        raise InputError(_with_flags(str(error))) from None


def _with_flags(text: str) -> str:
    """Return an error of a source in which keys of a config are flags."""
    hint = "; name the column with --text-field" if "text_field=" in text else ""
    text = text.removeprefix("source files: ").replace("text_field=", "--text-field ").replace("files=", "")
    for key in ("errors", "format"):
        text = text.replace(f"set {key}: ", f"set --{key} ").replace(f"{key}: text", f"--{key} text")
    return f"--files: {text}{hint}"


def note(text: str) -> None:
    """Print a note on stderr, apart from the result."""
    print(wrap(text), file=sys.stderr)
