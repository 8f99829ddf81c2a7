"""From settings to a run that can start: data, schedule, model, optimizer, and the state to go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from moe_gpt.config import RunConfig, TrainConfig
from moe_gpt.config_file import to_yaml
from moe_gpt.data.prepare import PreparedData, prepare_data
from moe_gpt.data.stream import TrainingStream
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.device import Precision, pick_precision, tune_process
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.train.checkpoint import (
    RunFacts,
    check_same_model,
    check_same_run,
    describe_environment,
    list_checkpoints,
    load_training_state,
    load_weights,
    read_config,
    read_state,
    resolve_checkpoint,
    verify_checkpoint,
)
from moe_gpt.train.evaluation import Evaluator
from moe_gpt.train.optimizer import build_optimizer
from moe_gpt.train.run_folder import refuse_existing_run
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
        init_from: run or checkpoint whose weights and tokenizer a new run starts with.
        say: told about slow steps and about differences that do not matter.

    Raises:
        InputError: for a folder that holds a run and is not to be resumed; settings, data or weights that do not
            fit together.
        FileNotFoundError: where ``init_from`` has no checkpoint.
    """
    found = list_checkpoints(run_dir) if resume else []
    if not resume:
        refuse_existing_run(run_dir)
    start_from = found[-1] if found else resolve_checkpoint(init_from) if init_from else None
    tokenizer = None
    if start_from:
        verify_checkpoint(start_from)
        tokenizer = _saved_tokenizer(start_from, config, is_resume=bool(found))
    data = prepare_data(config.data, tokenizer, say)
    config, shares = _fill_in(config, data)
    schedule = Schedule(config.schedule, config.optimizer, int(sum(shares)))
    precision = pick_precision(config.train.precision, device)
    tune_process()
    facts = RunFacts(config, data.tokenizer, data.fingerprint, describe_environment(device, precision))
    if found:
        _check_resumable(found[-1], facts, say)
    state = build_state(config, device)
    if found:
        load_training_state(state, found[-1])
    elif start_from:
        check_same_model(read_config(start_from).model, config.model)
        load_weights(state.model, start_from)
    apply_execution(state.model, config.train)
    return Run(
        config=config,
        run_dir=run_dir,
        device=device,
        precision=precision,
        data=data,
        schedule=schedule,
        stream=TrainingStream(
            [source.train for source in data.sources], shares, config.train.seed, schedule.longest_seq_len
        ),
        evaluator=Evaluator(
            data.sources,
            data.tokenizer,
            schedule.longest_seq_len,
            config.data.validation_tokens,
            config.train.micro_batch_tokens,
        ),
        state=state,
        facts=facts,
        passes={
            source.config.name: schedule.total_tokens * share / sum(shares) / len(source.train)
            for source, share in zip(data.sources, shares, strict=True)
        },
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


def _saved_tokenizer(path: Path, config: RunConfig, is_resume: bool) -> Tokenizer:
    """Return the checkpoint's tokenizer; a tokenizer file in the config must be the same one."""
    wanted = config.data.tokenizer
    saved = Tokenizer.load(path / "tokenizer.json", read_config(path).data.tokenizer.end_of_text)
    if wanted.file and not is_resume and Tokenizer.load(wanted.file, wanted.end_of_text).to_json() != saved.to_json():
        raise InputError(
            f"data.tokenizer.file={wanted.file} is not the tokenizer of {path}; "
            "leave the key out to use the checkpoint's"
        )
    return saved


def _fill_in(config: RunConfig, data: PreparedData) -> tuple[RunConfig, list[float]]:
    """Return the config with what follows from the data, and each source's share of the tokens."""
    uses_weights = any(source.config.weight for source in data.sources)
    shares: list[float] = [
        source.config.weight or 0.0 if uses_weights else (source.config.epochs or 1.0) * len(source.train)
        for source in data.sources
    ]
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    if vocab_size < data.tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size must be at least the tokenizer's {data.tokenizer.vocab_size}, got {vocab_size}; "
            "leave it out to follow the tokenizer"
        )
    schedule = Schedule(config.schedule, config.optimizer, int(sum(shares)))
    *stages, last = config.schedule.stages
    last = dataclasses.replace(last, until_tokens=schedule.total_tokens)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        schedule=dataclasses.replace(config.schedule, stages=(*stages, last)),
    ), shares


def _check_resumable(path: Path, facts: RunFacts, say: Callable[[str], None]) -> None:
    check_same_run(read_config(path), facts.config)
    saved = read_state(path)
    for name, digest in facts.data_fingerprint.items():
        if saved["data_fingerprint"].get(name) != digest:
            raise InputError(
                f"--resume needs the run's own data: the text of source {name} is not what it was at {path}; "
                "restore it, or start a new run with --init-from"
            )
    for key, old in saved["environment"].items():
        if facts.environment.get(key) != old:
            say(
                f"note: {key} was {old} and is now {facts.environment.get(key)}: the run goes on in the same data "
                "order, but not bit-identically"
            )


def write_run_files(run: Run) -> None:
    """Write the resolved config and the tokenizer into the run folder."""
    (run.run_dir / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    (run.run_dir / "tokenizer.json").write_text(run.data.tokenizer.to_json(), encoding="utf-8")
