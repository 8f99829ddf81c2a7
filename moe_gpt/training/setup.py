"""From settings to a run that can start: data, schedule, model, optimizer, and the saved or initial state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_gpt.config import RunConfig
from moe_gpt.data.prepare import PreparedData
from moe_gpt.distributed.parallelize import parallelize
from moe_gpt.distributed.process import SOLO, Team, join
from moe_gpt.distributed.sharding import whole_copy
from moe_gpt.errors import InputError
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import Precision, pick_precision, tune_process
from moe_gpt.training.adapters import let_learn
from moe_gpt.training.evaluation import Evaluator
from moe_gpt.training.fits import refuse_full_size, warn_of_memory
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.records.tracking import require_tracker
from moe_gpt.training.saving.changes import check_changes, describe_environment, find_changes
from moe_gpt.training.saving.checkpoint import (
    UPCYCLED,
    RunIdentity,
    load_training_state,
    read_config,
    read_state,
    read_tokenizer,
)
from moe_gpt.training.saving.initial_weights import InitialWeights, check_fits, open_initial_weights
from moe_gpt.training.saving.listing import Damaged, find_good_checkpoint
from moe_gpt.training.saving.own_code import describe_source
from moe_gpt.training.saving.run_folder import check_folder
from moe_gpt.training.schedule import OwnSchedule, Schedule, StepSchedule, fit_schedule, rounded_ends
from moe_gpt.training.stage import PRETRAINING, Material, Order, Stage, Start, build_evaluator
from moe_gpt.training.step import TrainState


@dataclass(frozen=True, repr=False)
class Run:
    """Everything that training needs. Only ``state`` changes."""

    config: RunConfig
    run_dir: Path
    device: torch.device
    precision: Precision
    data: PreparedData
    schedule: Schedule
    stream: Order
    evaluator: Evaluator
    state: TrainState
    identity: RunIdentity
    resumed_from: Path | None
    """The checkpoint of this run that ``state`` comes from, if it was resumed."""
    damaged: Sequence[Damaged]
    """Newer checkpoints that cannot be used."""
    changes: list[dict[str, Any]]
    """Settings, data and environment that changed since that checkpoint."""
    passes: dict[str, float]
    """How often the whole schedule visits each source's training tokens."""
    material: Material
    """What the run learns from."""
    stage: Stage = PRETRAINING
    """What the run does."""
    team: Team = SOLO
    """The ranks that train together."""

    def __repr__(self) -> str:
        """Return folder and progress in a line."""
        state, total = self.state, self.schedule.total_tokens
        return f"Run({str(self.run_dir)!r}, step {state.step}, {state.tokens_seen:,} of {total:,} tokens)"

    @property
    def document_end_id(self) -> int | None:
        """The id that ends a document of held-out text, if attention must not cross it; else None."""
        return self.data.tokenizer.end_of_text_id if self.config.data.document_masking else None

    @property
    def stream_end_id(self) -> int | None:
        """The id that ends a document of the stream, if attention must not cross it; else None."""
        return self.document_end_id if self.material.end_id is None else self.material.end_id

    def whole_model(self) -> MoEGPT | None:
        """Return the model, of several ranks a whole copy on rank 0 and None on the others; all must call it."""
        return self.state.model if self.team.size == 1 else whole_copy(self.state.model, self.team.is_main)

    @property
    def is_finished(self) -> bool:
        """Whether the schedule's last token has been seen."""
        return self.state.tokens_seen >= self.schedule.total_tokens


class OwnParts(NamedTuple):
    """A user's own router and schedule, in place of ours."""

    make_router: MakeRouter = Router
    schedule: StepSchedule | None = None

    def describe(self) -> dict[str, Any]:
        """Return the name and source digest of each, for the checkpoint; None for ours."""
        schedule = None if self.schedule is None else describe_source(type(self.schedule), None)
        return {"router": describe_source(self.make_router, Router), "schedule": schedule}


NOTHING_OWN = OwnParts()


def set_up_run(
    config: RunConfig,
    run_dir: Path,
    device: torch.device,
    resume: bool = False,
    init_from: str | None = None,
    allow_changes: Collection[str] = (),
    say: Callable[[str], None] = print,
    own: OwnParts = NOTHING_OWN,
    fit_steps: int | None = None,
    stage: Stage = PRETRAINING,
) -> Run:
    """Prepare data, build the model, and restore a checkpoint if there is one. Nothing is written to the run folder.

    Args:
        config: as the user gave it; the run's config also has what follows from the data.
        resume: resume from the folder's newest checkpoint, if there is one.
        init_from: run, checkpoint or Hugging Face folder whose weights and tokenizer a new run starts with.
        allow_changes: keys that may differ from the resumed run, although they change its results.
        say: shows slow steps, damaged checkpoints, and differences that do not stop the run.
        own: a user's router or schedule.
        fit_steps: shrink the schedule to this many optimizer steps.
        stage: what the run does.

    Raises:
        InputError: if the folder holds a run and ``resume`` is false; if settings, data or weights do not fit
            together; or if all checkpoints of the run are damaged.
        FileNotFoundError: if ``init_from`` has no model.
    """
    team = join(config)
    if not team.is_main:
        say = _nowhere
    team.from_main(lambda: check_folder(run_dir, resume))
    start = team.together(lambda: find_start(config, run_dir, init_from, say, own.make_router, team))
    config, start = team.together(lambda: stage.settle(config, start, say))
    parts = (run_dir, device, start, allow_changes, say, own, fit_steps, team, stage)
    return team.together(lambda: assemble(config, *parts))


def _nowhere(text: str) -> None:
    """Say nothing: rank 0 says it."""


def find_start(
    config: RunConfig,
    run_dir: Path,
    init_from: str | None,
    say: Callable[[str], None],
    make_router: MakeRouter = Router,
    team: Team = SOLO,
) -> Start:
    """Return the run's newest good checkpoint, else the model of ``init_from``, else an empty start."""
    damaged: list[Damaged] = []  # those that rank 0 has found
    newest = team.from_main(lambda: _newest_good_checkpoint(run_dir, say, damaged))
    if newest:
        saved = Path(newest)
        config = read_config(saved)
        tokenizer = read_tokenizer(saved, config.data.tokenizer.end_of_text)
        return Start(saved, damaged, tokenizer=tokenizer, vocab_size=config.model.vocab_size)
    if not init_from:
        return Start()
    max_seq_len = None if config.stage else config.model.max_seq_len
    initial = open_initial_weights(init_from, max_seq_len, make_router)
    return Start(initial=initial, tokenizer=initial.tokenizer, vocab_size=initial.model.vocab_size)


def assemble(
    config: RunConfig,
    run_dir: Path,
    device: torch.device,
    start: Start,
    allow_changes: Collection[str],
    say: Callable[[str], None],
    own: OwnParts = NOTHING_OWN,
    fit_steps: int | None = None,
    team: Team = SOLO,
    stage: Stage = PRETRAINING,
) -> Run:
    """Prepare data, check what changed since the checkpoint, build the model and restore or copy its weights.

    Arguments and errors are those of ``set_up_run``.
    """
    device = team.device(device)
    _check_start(start, config, say)
    refuse_full_size(config, device)
    material = team.main_first(lambda: stage.prepare(config, start, say))
    data, shares = material.data, material.shares(config.data)
    config, table, shares = fill_in(config, data, start.vocab_size, fit_steps, shares)
    schedule = _followed(own, table, config.model.max_seq_len, say)
    precision = pick_precision(config.train.precision, device, config.model.d_model)
    tune_process(device, config.train.deterministic)
    environment = describe_environment(device, precision, team.size)
    identity = RunIdentity(config, data.tokenizer, dict(material.fingerprint), environment)._replace(**own.describe())
    identity, changes = _with_history(identity, start, allow_changes, say)
    require_tracker(config.tracking)
    if team.size == 1:
        warn_of_memory(config, device, precision, say)
    return Run(
        config=config,
        run_dir=run_dir,
        device=device,
        precision=precision,
        data=data,
        schedule=schedule,
        stream=material.stream(config, shares),
        evaluator=build_evaluator(config, data),
        state=_state_of_rank(config, device, own, start, team, stage),
        identity=identity,
        resumed_from=start.saved,
        damaged=start.damaged,
        changes=changes,
        passes=material.passes(shares, schedule.total_tokens),
        material=material,
        stage=stage,
        team=team,
    )


def _state_of_rank(
    config: RunConfig, device: torch.device, own: OwnParts, start: Start, team: Team, stage: Stage
) -> TrainState:
    """Return this rank's part of model and optimizer, with initial, copied or restored weights."""
    kinds: list[type[MoEGPT]] = []

    def adapt(model: MoEGPT) -> MoEGPT:
        if start.initial:
            start.initial.copy_into(model)
        before = {(name, parameter.shape) for name, parameter in model.named_parameters()}
        model = stage.transform(config, model)
        kinds.append(type(model))
        let_learn(model, config, [name for name, p in model.named_parameters() if (name, p.shape) not in before])
        parallelize(model, config, team.layout)
        return model

    state = build_state(config, device, own.make_router, adapt)
    state.kind = kinds[0]
    if start.saved:
        load_training_state(state, start.saved)
    return state


def _followed(own: OwnParts, table: Schedule, max_seq_len: int, say: Callable[[str], None]) -> Schedule:
    """Return the user's schedule, or else that of the stage table; say where a stage ends early."""
    if own.schedule is not None:
        return OwnSchedule(own.schedule, table, max_seq_len)
    for note in rounded_ends(table):
        say(f"note: {note}")
    return table


def _with_history(
    identity: RunIdentity, start: Start, allow_changes: Collection[str], say: Callable[[str], None]
) -> tuple[RunIdentity, list[dict[str, Any]]]:
    """Add the run's origin to its identity; return that and the allowed changes since the checkpoint."""
    if start.initial:
        how = UPCYCLED if start.initial.is_upcycled_into(identity.config.model) else ""
        return identity._replace(initialised_from=f"{start.initial.path}{how}"), []
    if not start.saved:
        return identity, []
    before = read_state(start.saved)
    changes = check_changes(find_changes(read_config(start.saved), before, identity), allow_changes, say)
    history = (*before["changes"], *({"after_step": before["step"], **change} for change in changes))
    return identity._replace(initialised_from=before["initialised_from"], changes=history), changes


def _check_start(start: Start, config: RunConfig, say: Callable[[str], None]) -> None:
    if start.initial:
        check_fits(start.initial, config)
        _say_what_differs(start.initial, config, say)


def _say_what_differs(initial: InitialWeights, config: RunConfig, say: Callable[[str], None]) -> None:
    if initial.is_upcycled_into(config.model):
        say(
            f"note: these are weights of a dense model; each of the {config.model.n_experts} experts starts as a copy "
            "of its feed-forward network; to keep the model dense, set model.n_experts=1 model.top_k=1"
        )
    if initial.sees:
        say("note: that model sees; this run starts with its text model, and what it learnt of pictures stays behind")
    start, end = initial.tokenizer.template()
    if start or end:
        spelled = " ".join(initial.tokenizer.spell(index) for index in (*start, *end))
        say(
            f"note: this tokenizer's template puts {spelled} around every text; training here does not add these "
            "tokens, so the model will not expect them"
        )


def _newest_good_checkpoint(run_dir: Path, say: Callable[[str], None], damaged: list[Damaged]) -> str | None:
    """Return the checkpoint to resume, if there is one, and add the newer ones that are damaged to the list."""
    saved, found = find_good_checkpoint(run_dir)
    damaged += found
    if damaged and not saved:
        raise InputError(
            "\n".join(problem for _, problem in damaged)
            + f"\n{run_dir} has no undamaged checkpoint; start a new run with another --run-dir"
        )
    for _, problem in damaged:
        say(f"WARNING: {problem}")
    if damaged:
        say(f"WARNING: resuming from the newest undamaged checkpoint instead, {saved}")
    return str(saved) if saved else None


def build_state(
    config: RunConfig,
    device: torch.device,
    make_router: MakeRouter = Router,
    adapt: Callable[[MoEGPT], MoEGPT] = lambda model: model,
) -> TrainState:
    """Return a new model and optimizer. The seed gives the same initial weights on every device.

    ``adapt`` changes or replaces the model before the optimizer is made for its parameters.
    """
    if isinstance(make_router, nn.Module):
        raise InputError(
            f"make_router must make a router for each layer, got a router; give {type(make_router).__name__}"
        )
    torch.manual_seed(config.train.seed)
    model = MoEGPT(config.model, make_router).to(device)
    if config.model.balance == "bias" and not all(hasattr(m.router, "expert_bias") for m in model.moe_layers()):
        raise InputError("model.balance=bias needs a router with a buffer expert_bias; or use balance=loss or none")
    if make_router is not Router:
        _try_routers(model, device)
    model = adapt(model)
    return TrainState(model, build_optimizer(model, config.optimizer))


def _try_routers(model: MoEGPT, device: torch.device) -> None:
    """Let each layer's router route two tokens, so that a malformed routing is an error before a folder is made."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for layer in model.moe_layers():
            layer(torch.zeros(1, 2, model.config.d_model, device=device))


def fill_in(
    config: RunConfig,
    data: PreparedData,
    vocab_size: int | None,
    fit_steps: int | None = None,
    shares: list[float] | None = None,
) -> tuple[RunConfig, Schedule, list[float]]:
    """Fill in what follows from the data; return the config, its schedule, and each source's share of the tokens.

    Args:
        vocab_size: the vocabulary of the initial weights; used if the config has none.
        fit_steps: shrink the schedule to this many optimizer steps.
        shares: of the sources; those of their text by default.
    """
    shares = shares or Material(data).shares(config.data)
    vocab_size = config.model.vocab_size or vocab_size or data.tokenizer.vocab_size
    if vocab_size < data.tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size must be at least the tokenizer's {data.tokenizer.vocab_size}, got {vocab_size}; "
            "leave it out to follow the tokenizer"
        )
    schedule = Schedule(config.schedule, config.optimizer, int(sum(shares)))
    if fit_steps:
        fitted = fit_schedule(config.schedule, config.optimizer, schedule, fit_steps)
        config, schedule = dataclasses.replace(config, schedule=fitted), Schedule(fitted, config.optimizer, 0)
    stages = [dataclasses.replace(stage.config, until_tokens=stage.end) for stage in schedule.stages]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        schedule=dataclasses.replace(config.schedule, stages=tuple(stages)),
    )
    return config, schedule, shares
