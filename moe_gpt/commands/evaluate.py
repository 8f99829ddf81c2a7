"""``moe-gpt evaluate``: loss, perplexity and bits per byte of held-out text, or of any files."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from moe_gpt.commands.generate import load_as_told, warn_of_context
from moe_gpt.commands.options import AboveZero, Device, Precision, Quantize, Switch, Whole, Words, flat
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel
    from moe_gpt.config import RunConfig

FILES, HELD_OUT, PLACE = (Group.create_ordered(name) for name in ("Files", "The run's held-out text", "Model"))
_OF_FILES = ("stride", "text_field", "errors", "format", "max_seq_len")
_OF_HELD_OUT = ("by_position", "rope_theta", "max_tokens", "retrieval")


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
    retrieval: Annotated[Switch, Parameter(group=HELD_OUT)] = False
    """Ask what functions of held-out modules do, with and without a search in docstrings; needs '.[search]'."""
    context: Annotated[Whole | None, Parameter(group=PLACE)] = None
    """Length of the sequences; by default the longest that the run was trained on."""
    router: Annotated[str | None, Parameter(group=PLACE)] = None
    """Your own router, as FILE.py:NAME, if the model was trained with one."""
    precision: Annotated[Precision, Parameter(group=PLACE)] = "auto"
    """Compute type."""
    quantize: Annotated[Quantize | None, Parameter(group=PLACE)] = None
    """Weights in fewer bits: int8, int4. Their products take bf16; --precision is for the rest (docs/quantised.md)."""
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
        model: A run folder (its newest checkpoint) or a checkpoint; with --files also what generate takes besides.
    """
    options.check()

    from moe_gpt.training.saving.saved_model import resolve_checkpoint

    if not options.files:
        resolve_checkpoint(model)  # says what other folders are
    loaded = load_as_told(model, options)
    score = score_files if options.files else ask_with_search if options.retrieval else score_held_out
    print(score(loaded, options))


def ask_with_search(loaded: LanguageModel, options: EvaluateOptions) -> str:
    """Return a table of how good answers about functions are with and without a search."""
    from moe_gpt.post_training.retrieval import score_retrieval
    from moe_gpt.post_training.starting import held_out_fraction, require_marks
    from moe_gpt.terminal.tables import format_table

    config, tokenizer = loaded.run_config, loaded.require_tokenizer()
    assert config, "a run has a config"
    require_marks(tokenizer, "questions on functions")
    scores = score_retrieval(loaded.model, tokenizer, held_out_fraction(config.data), loaded.precision)
    rows = [(name, f"{s.n:,}", f"{s.score:.3f} ± {s.standard_error:.3f}") for name, s in scores.items()]
    return format_table(("score", "n", "mean ± standard error"), rows)


def _require_held_out_text(config: RunConfig) -> None:
    if not config.data.validation_fraction:
        raise InputError("this run holds out no text (data.validation_fraction=0); give other text with --files")


def score_held_out(loaded: LanguageModel, options: EvaluateOptions) -> str:
    """Return a table with a row for each source of the run."""
    from moe_gpt.data.prepare import prepare_data
    from moe_gpt.training.evaluation import format_positions, format_scores
    from moe_gpt.training.saving.checkpoint import read_state
    from moe_gpt.training.stage import build_evaluator

    config, model = loaded.run_config, loaded.model
    assert config, "a run has a config"
    _require_held_out_text(config)
    data = prepare_data(config.data, loaded.tokenizer, say=note)
    trained_on = read_state(loaded.path)["data_fingerprint"]  # a stage after pre-training has its own rows beside
    if any(trained_on.get(name) != digest for name, digest in data.fingerprint.items()):
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
