"""``moe-gpt prepare``: tokenise the text of a config ahead of training, and show the sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from moe_gpt.commands.options import Switch, Whole, Words, flat
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.terminal.tables import format_table
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.config import DataConfig, RunConfig
    from moe_gpt.data.prepare import PreparedData
    from moe_gpt.data.tokenizer import Tokenizer

_SHOWN_TOKENS = 256
_MACHINES = Group.create_ordered("Many machines")


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Who tokenises."""

    engine: Annotated[Literal["local", "ray", "slurm"] | None, Parameter(group=_MACHINES)] = None
    """Prepare in tasks, with datatrove: as processes of this machine, on a Ray cluster, or as Slurm jobs."""
    tasks: Annotated[Whole | None, Parameter(group=_MACHINES)] = None
    """Tasks for each source; one per core by default, for the engine local only. They do not change the tokens."""
    engine_option: Annotated[Words, Parameter(group=_MACHINES)] = ()
    """An argument of datatrove's executor, as KEY=VALUE, such as workers=4, partition=cpu or time=12:00:00."""

    def check(self) -> None:
        """Raise ``InputError`` if options do not fit each other."""
        for name in ("tasks", "engine_option") if self.engine is None else ():
            if getattr(self, name):
                raise InputError(f"--{name.replace('_', '-')} needs --engine local, ray or slurm")
        if self.engine in ("ray", "slurm") and self.tasks is None:
            raise InputError(f"--engine {self.engine} needs --tasks, the number of tasks for each source")


def prepare(config: str, *overrides: str, show: Switch = False, options: EngineOptions = EngineOptions()) -> None:
    """Tokenise the text of a config where that is not done yet, and print a table of its sources.

    Args:
        config: A YAML file, or the name of a config that comes with moe_gpt, such as tiny.yaml.
        overrides: Settings that replace those of the file, as key.path=value.
        show: Also print sequences as training will read them.
    """
    options.check()
    settings = load_run_config(config, overrides)

    from moe_gpt.data.prepare import prepare_data
    from moe_gpt.training.setup import fill_in

    def say(text: str) -> None:
        print(wrap(text), flush=True)

    tokenizer = prepare_in_tasks(settings.data, options, say) if options.engine else None
    if options.engine and tokenizer is None:
        return
    data = prepare_data(settings.data, tokenizer, say)
    try:
        settings, schedule, shares = fill_in(settings, data, None)
    except InputError:  # the text is there, although the schedule does not fit it
        show_sizes(data, show)
        raise
    print(describe_sources(data, shares, schedule.total_tokens))
    if show:
        show_sequences(settings, data, shares)
        for source in filter(lambda source: source.train.lost, data.sources):
            print(wrap(f"\nWARNING: {source.train.lost}"))


def prepare_in_tasks(config: DataConfig, options: EngineOptions, say: Callable[[str], None]) -> Tokenizer | None:
    """Prepare with an engine and print what each step removed; return the tokenizer, or None if Slurm has to end first.

    Raises:
        InputError: if packages are missing, or a task failed.
    """
    from moe_gpt.data.encode import available_cores
    from moe_gpt.scale.extra import require_packages

    require_packages(str(options.engine), config)

    from moe_gpt.scale.engines import make_engine
    from moe_gpt.scale.prepare import prepare_at_scale

    engine = make_engine(str(options.engine), options.engine_option)
    tokenizer, summaries, jobs = prepare_at_scale(config, engine, options.tasks or available_cores(), say)
    for summary in summaries:
        print(f"{summary.table()}\n")
    if jobs:
        say(
            f"Slurm jobs {', '.join(jobs)}; repeat this command when they have ended, for the result or for what failed"
        )
    return None if jobs else tokenizer


def show_sizes(data: PreparedData, show: bool) -> None:
    """Print the size of each source, and how it begins."""
    for source in data.sources:
        print(f"{source.config.name}: {len(source.train):,} train tokens, {len(source.validation):,} held out")
        for split in (source.train, source.validation) if show else ():
            print(data.tokenizer.decode(split.tokens[:_SHOWN_TOKENS].tolist()))


def describe_sources(data: PreparedData, shares: list[float], total_tokens: int) -> str:
    """Return a table of the sources: the size of each, and the share and passes of the run."""
    rows = []
    for source, share in zip(data.sources, shares, strict=True):
        part, train = share / sum(shares), source.train
        rows.append(
            (
                source.config.name,
                f"{len(train.document_ends) + len(source.validation.document_ends):,}",
                f"{len(train):,}",
                f"{len(source.validation):,}",
                f"{train.n_bytes / len(train):.2f}",
                f"{part:.1%}",
                f"{total_tokens * part / len(train):.2f}",
            )
        )
    table = format_table(("source", "documents", "train tokens", "held out", "bytes/token", "share", "passes"), rows)
    size = data.tokenizer.vocab_size
    return f"{table}\na run of {total_tokens:,} tokens; vocabulary {size:,}; passes count the training tokens only"


def show_sequences(config: RunConfig, data: PreparedData, shares: list[float]) -> None:
    """Print the first sequence of every stage, and of the middle of the run, with the place it comes from."""
    from moe_gpt.training.schedule import Schedule
    from moe_gpt.training.stage import build_stream

    schedule = Schedule(config.schedule, config.optimizer, 0)
    stream = build_stream(config, data, shares)
    for stage in schedule.stages:
        seq_len = stage.config.seq_len
        for start in (stage.start, stage.start + (stage.end - stage.start) // 2 // seq_len * seq_len):
            place = stream.locate(start)
            name = data.sources[place.source].config.name
            print(
                f"\n--- token {start:,}, {seq_len} tokens: {name}, pass {place.epoch + 1}, document {place.document}, "
                f"from its token {place.offset} ---"
            )
            print(data.tokenizer.decode(stream.batch(start, seq_len, seq_len).inputs[0].tolist()))
