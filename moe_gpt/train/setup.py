"""From settings to a run that can start: data, schedule, model, optimizer, and the state to go on from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from moe_gpt.config import RunConfig, TrainConfig
from moe_gpt.data.prepare import PreparedData, prepare_data
from moe_gpt.data.stream import TrainingStream
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.device import Precision, pick_precision, tune_process
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.train.checkpoint import (
    RunFacts,
    check_same_run,
    describe_environment,
    list_checkpoints,
    load_training_state,
    read_config,
    read_state,
    verify_checkpoint,
)
from moe_gpt.train.evaluation import Evaluator
from moe_gpt.train.initial_weights import check_fits, open_initial_weights
from moe_gpt.train.optimizer import build_optimizer
from moe_gpt.train.run_folder import check_writable, refuse_existing_run
from moe_gpt.train.schedule import Schedule
from moe_gpt.train.step import TrainState
from moe_gpt.validation import InputError


@dataclass(frozen=True)
class Run:
    """Everything that training needs; only ``state`` changes."""

    config: RunConfig
    run_dir: Path
    device: torch.device
    precision: Precision
    data: PreparedData
    schedule: Schedule
    stream: TrainingStream
    evaluator: Evaluator
    state: TrainState
    facts: RunFacts
    resumed_from: Path | None
    """The checkpoint of this run that ``state`` was restored from."""
    passes: dict[str, float]
    """How often the whole schedule visits each source's training tokens."""

    @property
    def is_finished(self) -> bool:
        """Whether the schedule's last token has been seen."""
        return self.state.tokens_seen >= self.schedule.total_tokens


def set_up_run(
    config: RunConfig,
    run_dir: Path,
    device: torch.device,
    resume: bool = False,
    init_from: str | None = None,
    say: Callable[[str], None] = print,
) -> Run:
    """Prepare data, build the model, and restore what is to be restored. The run folder is not touched.

    Args:
        config: as the user gave it; what follows from the data is filled in.
        run_dir: where the run will be, or is.
        device: where to train.
        resume: go on from the folder's newest checkpoint, if there is one.
        init_from: run, checkpoint or Hugging Face folder whose weights and tokenizer a new run starts with.
        say: told about slow steps and about differences that do not matter.

    Raises:
        InputError: for a folder that holds a run and is not to be resumed; settings, data or weights that do not
            fit together.
        FileNotFoundError: where ``init_from`` has no model.
    """
    if not resume:
        refuse_existing_run(run_dir)
    check_writable(run_dir)
    found = list_checkpoints(run_dir)
    saved = found[-1] if found else None
    initial = open_initial_weights(init_from, config.model.max_seq_len) if init_from and not saved else None
    tokenizer, vocab_size = None, None
    if saved:
        verify_checkpoint(saved)
        tokenizer = Tokenizer.load(saved / "tokenizer.json", config.data.tokenizer.end_of_text)
        vocab_size = read_config(saved).model.vocab_size
    elif initial:
        check_fits(initial, config)
        tokenizer, vocab_size = initial.tokenizer, initial.model.vocab_size
    data = prepare_data(config.data, tokenizer, say)
    config, schedule, shares = _fill_in(config, data, vocab_size)
    precision = pick_precision(config.train.precision, device)
    tune_process(device)
    origin = str(initial.path) if initial else read_state(saved).get("initialised_from") if saved else None
    environment = describe_environment(device, precision)
    facts = RunFacts(config, data.tokenizer, data.fingerprint, environment, initialised_from=origin)
    if saved:
        _check_resumable(saved, facts, say)
    state = build_state(config, device)
    if saved:
        load_training_state(state, saved)
    elif initial:
        initial.copy_into(state.model)
    apply_execution(state.model, config.train)
    seq_lens = [stage.config.seq_len for stage in schedule.stages]
    texts = [source.train for source in data.sources]
    return Run(
        config=config,
        run_dir=run_dir,
        device=device,
        precision=precision,
        data=data,
        schedule=schedule,
        stream=TrainingStream(texts, shares, config.train.seed, chunk_tokens=math.lcm(*seq_lens)),
        evaluator=build_evaluator(config, data),
        state=state,
        facts=facts,
        resumed_from=saved,
        passes={
            source.config.name: schedule.total_tokens * share / sum(shares) / len(source.train)
            for source, share in zip(data.sources, shares, strict=True)
        },
    )


def build_evaluator(config: RunConfig, data: PreparedData, max_tokens: int | None = None) -> Evaluator:
    """Return the run's evaluation: its held-out text in sequences of its longest length."""
    return Evaluator(
        data.sources,
        data.tokenizer,
        seq_len=max(stage.seq_len for stage in config.schedule.stages),
        max_tokens=max_tokens or config.data.validation_tokens,
        batch_tokens=config.train.micro_batch_tokens,
    )


def build_state(config: RunConfig, device: torch.device) -> TrainState:
    """Return a fresh model and optimizer; the initial weights are the same on every device."""
    torch.manual_seed(config.train.seed)
    model = MoEGPT(config.model).to(device)
    return TrainState(model, build_optimizer(model, config.optimizer))


def apply_execution(model: MoEGPT, config: TrainConfig) -> None:
    """Apply activation checkpointing, then compilation, to each block in place; names of parameters stay."""
    for block in model.blocks:
        if config.activation_checkpointing:
            block.forward = _checkpointed(block.forward)
        if config.compile:
            block.compile()


def _checkpointed(forward: Callable) -> Callable:
    """Wrap a forward function; a plain closure, because torch.compile looks into it and skips a partial."""

    def run(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False)

    return run


def _fill_in(config: RunConfig, data: PreparedData, vocab_size: int | None) -> tuple[RunConfig, Schedule, list[float]]:
    """Return the config with what follows from the data, its schedule, and each source's share of the tokens.

    Args:
        config: as the user gave it.
        data: the tokenised sources.
        vocab_size: of the weights that the run goes on from; used where the config names none.
    """
    uses_weights = any(source.config.weight for source in data.sources)
    shares: list[float] = [
        source.config.weight or 0.0 if uses_weights else (source.config.epochs or 1.0) * len(source.train)
        for source in data.sources
    ]
    vocab_size = config.model.vocab_size or vocab_size or data.tokenizer.vocab_size
    if vocab_size < data.tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size must be at least the tokenizer's {data.tokenizer.vocab_size}, got {vocab_size}; "
            "leave it out to follow the tokenizer"
        )
    schedule = Schedule(config.schedule, config.optimizer, int(sum(shares)))
    *stages, last = config.schedule.stages
    last = dataclasses.replace(last, until_tokens=schedule.total_tokens)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        schedule=dataclasses.replace(config.schedule, stages=(*stages, last)),
    )
    return config, schedule, shares


def _check_resumable(path: Path, facts: RunFacts, say: Callable[[str], None]) -> None:
    saved = read_state(path)
    for name, digest in facts.data_fingerprint.items():
        if saved["data_fingerprint"].get(name, digest) != digest:
            raise InputError(
                f"--resume needs the run's own data: the text of source {name} is not what it was at {path}; "
                "restore it, or start a new run with --init-from"
            )
    check_same_run(read_config(path), facts.config)
    for key, old in saved["environment"].items():
        if facts.environment.get(key) != old:
            say(
                f"note: {key} was {old} and is now {facts.environment.get(key)}: the run goes on in the same data "
                "order, but not bit-identically"
            )
