"""What a run learns from, and how. By default it predicts the next token of its sources' text.

A stage after pre-training replaces parts of this: how config and weights are brought together, the material, the step.
The loop, the schedule, checkpoints and logs are the same for all stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from moe_gpt.config import DataConfig, RunConfig
from moe_gpt.data.prepare import PreparedData, prepare_data
from moe_gpt.data.stream import Batch, Location, TrainingStream
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.evaluation import Evaluator
from moe_gpt.training.saving.initial_weights import InitialWeights
from moe_gpt.training.saving.listing import Damaged
from moe_gpt.training.schedule import StepPlan, chunk_tokens
from moe_gpt.training.step import StepResult

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

Say = Callable[[str], None]


class Start(NamedTuple):
    """What a run begins with, from its run folder or ``--init-from``."""

    saved: Path | None = None
    """The checkpoint to resume from."""
    damaged: Sequence[Damaged] = ()
    """Newer checkpoints that cannot be used."""
    initial: InitialWeights | None = None
    """A trained model to start with."""
    tokenizer: Tokenizer | None = None
    """The tokenizer of either of them."""
    vocab_size: int | None = None
    """The vocabulary of either of them."""


class Order(Protocol):
    """What a run reads, in closed form."""

    def locate(self, token_index: int) -> Location:
        """Return where a token of the run comes from."""


class Stream(Order, Protocol):
    """Tokens in closed form, as ``TrainingStream`` has them; pre-training's step reads one."""

    def batch(self, tokens_seen: int, seq_len: int, batch_tokens: int, rank: int = 0, n_ranks: int = 1) -> Batch:
        """Return a rank's part of the next ``batch_tokens`` tokens as sequences of ``seq_len``, with their targets."""


@dataclasses.dataclass(frozen=True)
class Material:
    """What a run learns from: of pre-training, the text of the sources."""

    data: PreparedData
    """The tokenizer, and the text that evaluations read."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """A digest of the tokens by name."""
        return self.data.fingerprint

    @property
    def names(self) -> list[str]:
        """The name of each source of the stream."""
        return [source.config.name for source in self.data.sources]

    @property
    def end_id(self) -> int | None:
        """The token that ends a document of the stream; None leaves it to ``data.document_masking``."""
        return None

    def shares(self, config: DataConfig) -> list[float]:
        """Return each source's share of the mixture: its weight, or else the tokens of its passes."""
        if config.has_weights:
            return [source.config.weight or 0.0 for source in self.data.sources]
        return [source.config.passes * len(source.train) for source in self.data.sources]

    def stream(self, config: RunConfig, shares: Sequence[float]) -> Order:
        """Return what the run reads: a ``Stream``, unless the stage's step reads something else."""
        return build_stream(config, self.data, shares)

    def passes(self, shares: Sequence[float], total_tokens: int) -> dict[str, float]:
        """Return how often a whole schedule visits each source's training tokens."""
        return {
            source.config.name: total_tokens * share / sum(shares) / len(source.train)
            for source, share in zip(self.data.sources, shares, strict=True)
        }

    def describe(self, run: Run) -> Iterator[str]:
        """Yield lines for people: the sources, and how often the run reads them."""
        for source in self.data.sources:
            name = source.config.name
            held_out = f"{len(source.validation):,} held-out tokens" if len(source.validation) else "no held-out tokens"
            yield (
                f"           {name}: {len(source.train):,} training and {held_out}; "
                f"this run reads the training tokens {run.passes[name]:.2f} times"
            )
        if not run.config.data.validation_fraction:
            yield "note       all text is for training (data.validation_fraction=0), so there is no validation loss;"
            yield "           moe-gpt evaluate RUN --files measures the loss of other text"


def prepare_text(config: RunConfig, start: Start, say: Say) -> Material:
    """Return the text of the sources, tokenised."""
    return Material(prepare_data(config.data, start.tokenizer, say))


def as_given(config: RunConfig, start: Start, say: Say) -> tuple[RunConfig, Start]:
    """Return config and start as they are."""
    return config, start


class Stage(NamedTuple):
    """What a run does; the default is pre-training."""

    settle: Callable[[RunConfig, Start, Say], tuple[RunConfig, Start]] = as_given
    """Brings the config and the weights to start with together, before they are compared."""
    prepare: Callable[[RunConfig, Start, Say], Material] = prepare_text
    """Prepares what the run learns from."""
    transform: Callable[[RunConfig, MoEGPT], MoEGPT] = lambda config, model: model
    """Returns what is trained: a model that starts with the weights of one of the config's shape."""
    take_step: Callable[[Run, StepPlan, bool], StepResult] | None = None
    """Takes an optimizer step; None takes that of pre-training."""


PRETRAINING = Stage()


def build_evaluator(
    config: RunConfig, data: PreparedData, max_tokens: int | None = None, seq_len: int | None = None
) -> Evaluator:
    """Return the evaluation of a run's held-out text, in sequences of ``seq_len`` or of the run's longest length."""
    return Evaluator(
        data.sources,
        data.tokenizer,
        seq_len=seq_len or max(stage.seq_len for stage in config.schedule.stages),
        max_tokens=max_tokens or config.data.validation_tokens,
        batch_tokens=config.train.micro_batch_tokens,
        keeps_documents_apart=config.data.document_masking,
    )


def build_stream(config: RunConfig, data: PreparedData, shares: Sequence[float]) -> TrainingStream:
    """Return the stream of the sources' text; its chunks hold whole sequences of every stage."""
    unit = chunk_tokens(config.schedule.stages)
    return TrainingStream([source.train for source in data.sources], shares, config.train.seed, unit)
