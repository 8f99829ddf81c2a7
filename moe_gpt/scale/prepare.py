"""Preparing the sources of a config as pipelines of many tasks, with the same bytes as one process would write.

A source is cut into parts (``cut.py``). Each task reads, filters and tokenises one part (``steps.py``); the merge puts
the parts in order into a store (``parts.py``). Whether a document is held out depends on its text alone, so a task
decides this without the others. Only exact repeats and limits need the whole source, and the merge applies them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter

from moe_gpt.config import DataConfig, SourceConfig
from moe_gpt.data.corpus import iterate_documents
from moe_gpt.data.encode import Encoder, refuse_in_starting_process
from moe_gpt.data.prepare import build_once, obtain_tokenizer, store_folder, usable_cache
from moe_gpt.data.read_back import first_of, what_is_lost
from moe_gpt.data.token_store import SPLITS, TokenStore, Writers, dtype_of, total_of, write_store
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.files.durable import delete_leftovers
from moe_gpt.scale.cut import cut_source
from moe_gpt.scale.engines import Engine, Stage, run_stage, running_jobs, submit
from moe_gpt.scale.parts import Merge, Merged
from moe_gpt.scale.steps import Finish, Read, Sign, Tokenise, make_filters, minhash_config
from moe_gpt.scale.summary import Summary, dropped
from moe_gpt.terminal.progress import ProgressBar

_SECONDS_BETWEEN_LOOKS = 2.0


class Job(NamedTuple):
    """The preparation of one source: its store, and the folder of what is needed on the way there."""

    source: SourceConfig
    config: DataConfig
    tokenizer: Tokenizer
    store: Path
    n_tasks: int

    @property
    def folder(self) -> Path:
        """The folder of parts, marks and logs. Another number of tasks cuts the source otherwise."""
        return self.store.parents[1] / "scale" / f"{self.store.name}-{self.n_tasks}"

    @property
    def failures(self) -> Path:
        """The folder in which tasks note why they failed."""
        return self.folder / "failures"

    @property
    def summary_file(self) -> Path:
        """The summary, which stays."""
        return self.folder.parent / f"{self.store.name}.json"


class Prepared(NamedTuple):
    """The tokenizer, the summaries of sources that are ready, and the ids of Slurm jobs that others wait for."""

    tokenizer: Tokenizer
    summaries: list[Summary]
    jobs: list[str]


def prepare_at_scale(config: DataConfig, engine: Engine, n_tasks: int, say: Callable[[str], None] = print) -> Prepared:
    """Build the stores of all sources that are not in the cache; ``prepare_data`` then opens them.

    A script of your own must call this under ``if __name__ == "__main__":``.

    Args:
        n_tasks: parts of each source. The store does not depend on it.
        say: shows what is being built.

    Raises:
        InputError: naming the source or setting that cannot be used, or the task that failed.
    """
    refuse_in_starting_process()
    submitted: list[str] = []
    with usable_cache(config) as cache:
        tokenizer = obtain_tokenizer(config, cache, say)
        jobs = [
            Job(
                _anywhere(source), config, tokenizer, store_folder(source, config, tokenizer, cache).absolute(), n_tasks
            )
            for source in config.sources
        ]
        for job in jobs:
            build = functools.partial(_submit, submitted) if engine.name == "slurm" else _build
            what = f"tokenising {job.source.name}"
            build_once([job.store], what, say, functools.partial(build, job, engine, say))
            if job.store.exists():
                shutil.rmtree(job.folder, ignore_errors=True)
    found = [Summary.load(job.summary_file) for job in jobs if job.store.exists()]
    return Prepared(tokenizer, [summary for summary in found if summary], submitted)


def _anywhere(source: SourceConfig) -> SourceConfig:
    """Return a source that can be read from any working directory."""
    path = Path(source.dataset or "")
    return dataclasses.replace(source, dataset=str(path.absolute())) if source.dataset and path.exists() else source


def _build(job: Job, engine: Engine, say: Callable[[str], None]) -> None:
    """Run all stages, and merge the parts here."""
    delete_leftovers(job.folder / "parts", "")
    say(f"tokenising {job.source.name}: {job.n_tasks:,} tasks, engine {engine.name}")
    with contextlib.closing(ProgressBar(job.source.name, say=say)) as bar:
        for stage in _stages(job):
            with _watching(bar, job, stage):
                run_stage(engine, stage, job.folder, job.failures)
        finish(job, functools.partial(_report, bar, job))


def _submit(jobs: list[str], job: Job, engine: Engine, say: Callable[[str], None]) -> None:
    """Submit all stages and the merge to Slurm, unless they are there already; add the ids to ``jobs``."""
    if running := running_jobs(job.folder):
        jobs += running
        return
    for file in sorted(job.failures.glob("*.txt")):
        say(f"{job.source.name}, {file.stem} failed: {file.read_text(encoding='utf-8')}")
    shutil.rmtree(job.failures, ignore_errors=True)
    delete_leftovers(job.folder / "parts", "")
    merge = Stage("merge", [Finish(functools.partial(finish, job), job.failures)], 1)
    jobs += submit(engine, [*_stages(job), merge], job.folder)


def _stages(job: Job) -> list[Stage]:
    settings, folder = job.config.near_duplicates, job.folder / "near_duplicates"
    pieces = cut_source(job.source, job.n_tasks)
    encoder = Encoder(job.tokenizer, job.config.validation_fraction, job.source.fim_rate, job.source.fim_spm_rate)
    tokenise = Tokenise(job.source, encoder, job.folder / "parts", job.failures)

    def reading() -> list[PipelineStep]:
        return [Read(job.source, pieces), *make_filters(job.config.filters)]

    if not settings.remove:
        return [Stage("tokens", [*reading(), tokenise], job.n_tasks)]
    hashes = minhash_config(settings)
    signatures, matches, removed = (str(folder / name) for name in ("signatures", "matches", "removed"))
    sign = Sign(signatures, hashes, settings.language, job.failures)
    return [
        Stage("signatures", [*reading(), sign], job.n_tasks),
        Stage("matches", [MinhashDedupBuckets(signatures, matches, config=hashes)], settings.buckets),
        Stage("groups", [MinhashDedupCluster(matches, removed, config=hashes)], 1),
        Stage("tokens", [*reading(), MinhashDedupFilter(removed), tokenise], job.n_tasks),
    ]


def finish(job: Job, report: Callable[[int, int], None] = lambda n_documents, n_tokens: None) -> None:
    """Merge the parts of all tasks into the store, and save the summary."""
    source, found, n_documents = job.source, Merged(), 0
    parts = [job.folder / "parts" / f"{task:05d}" for task in range(job.n_tasks)]
    merge = Merge(parts, job.tokenizer, source.deduplicate, source.max_documents, source.max_tokens)

    def write(writers: Writers) -> None:
        nonlocal found, n_documents
        found = merge(writers, report)
        n_documents = total_of(writers, "n_documents")

    first, _ = first_of(iterate_documents(source), lambda document: len(document.text))
    lost = what_is_lost((document.text for document in first), job.tokenizer, source.name)
    write_store(source.name, write, job.tokenizer, job.store, job.config.validation_fraction, lost)
    _summarise(job, found, n_documents).save(job.summary_file)


def _summarise(job: Job, found: Merged, n_documents: int) -> Summary:
    names = [*job.config.filters, *(["near duplicates"] if job.config.near_duplicates.remove else [])]
    n_read, removed = dropped(job.folder / "tokens" / "stats", dict(enumerate(names, 1)))
    if job.source.deduplicate:
        removed["exact repeats"] = found.n_repeats
    if job.source.max_documents or job.source.max_tokens:
        removed["beyond the limits"] = found.n_beyond
    train, validation = (TokenStore(job.store, split, check=False) for split in SPLITS)
    return Summary(
        source=job.source.name,
        n_tasks=job.n_tasks,
        n_read=n_read,
        removed=removed,
        n_documents=n_documents,
        train_tokens=len(train),
        held_out_tokens=len(validation),
        task_seconds=found.seconds,
        versions={name: importlib.metadata.version(name) for name in ("datatrove", "tokenizers")},
    )


@contextlib.contextmanager
def _watching(bar: ProgressBar, job: Job, stage: Stage) -> Iterator[None]:
    """Show how many tasks of a stage are finished, and how many tokens there are, from the files that tasks write."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            n_done = len(list((job.folder / stage.name / "completions").glob("*")))
            sizes = [_size(file) for file in (job.folder / "parts").glob("*/*.bin")]
            tokens = f", {sum(sizes) // dtype_of(job.tokenizer).itemsize:,} tokens" if sizes else ""
            line = f"{job.source.name}, {stage.name}: {n_done:,} of {stage.n_tasks:,} tasks{tokens}"
            bar.update(n_done, f"tasks, {stage.name}{tokens}", line, total=stage.n_tasks)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # its folder was renamed
        return 0


def _report(bar: ProgressBar, job: Job, n_documents: int, n_tokens: int) -> None:
    line = f"merging {job.source.name}: {n_documents:,} documents, {n_tokens:,} tokens"
    bar.update(job.n_tasks, f"tasks, merging: {n_tokens:,} tokens", line, total=job.n_tasks)
