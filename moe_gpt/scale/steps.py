"""The steps of the pipelines, as ``datatrove`` runs them: reading, filters, near duplicates, tokenising, merging."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document as PipelineDocument
from datatrove.data import DocumentsPipeline
from datatrove.pipeline import filters
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from moe_gpt.config import SourceConfig
from moe_gpt.config.data import NearDuplicatesConfig
from moe_gpt.data.document import Document
from moe_gpt.data.encode import EncodedDocument, Encoder
from moe_gpt.data.tokenizer import in_groups
from moe_gpt.errors import InputError, shown
from moe_gpt.files.durable import replace_file
from moe_gpt.scale.cut import Piece, read_part
from moe_gpt.scale.parts import write_part

_GROUP_CHARS = 1 << 19


@contextlib.contextmanager
def noted(folder: Path, stage: str, task: int) -> Iterator[None]:
    """Write the failure of a task to a file of ``folder``, because not every engine passes it on."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        replace_file(folder / f"{stage}, task {task}.txt", text)
        raise


class Read(PipelineStep):
    """Reads a task's part of a source."""

    type, name = "reader", "read"

    def __init__(self, source: SourceConfig, pieces: list[list[Piece]]) -> None:
        super().__init__()
        self.source, self.pieces = source, pieces

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield documents; each carries the original one."""
        for number, document in enumerate(read_part(self.source, self.pieces, rank)):
            self.stat_update("total")
            yield PipelineDocument(document.text, f"{rank}/{number}", metadata={"original": document})


class Sign(MinhashDedupSignature):
    """Writes the MinHash signatures of a task's documents."""

    def __init__(self, folder: str, config: MinhashConfig, language: str, failures: Path) -> None:
        super().__init__(folder, config, language)
        self.failures = failures

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write the signatures of all documents."""
        with noted(self.failures, "signatures", rank):
            super().run(data, rank, world_size)


class Tokenise(PipelineStep):
    """Writes the tokens of a task's documents as a part.

    Args:
        parts: the folder of all parts.
        failures: the folder for the failures of tasks.
    """

    type, name = "tokenizer", "tokenise"

    def __init__(self, source: SourceConfig, encoder: Encoder, parts: Path, failures: Path) -> None:
        super().__init__()
        self.source, self.encoder, self.parts, self.failures = source, encoder, parts, failures

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write the part of this task."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there are other tasks beside this one
        began = time.monotonic()
        with noted(self.failures, "tokens", rank):
            encoded = self._within_limits(self._encoded(data))
            write_part(self.parts / f"{rank:05d}", encoded, self.encoder.tokenizer, lambda: time.monotonic() - began)

    def _encoded(self, data: DocumentsPipeline) -> Iterator[tuple[EncodedDocument, bytes]]:
        documents = (_as_document(document) for document in data or () if document.text)
        for group in in_groups(documents, lambda document: len(document.text), _GROUP_CHARS):
            digests = (hashlib.sha256(document.text.encode()).digest()[:16] for document in group)
            yield from zip(self.encoder(group), digests, strict=True)

    def _within_limits(
        self, documents: Iterator[tuple[EncodedDocument, bytes]]
    ) -> Iterator[tuple[EncodedDocument, bytes]]:
        """Stop where this part alone reaches the source's limits, unless the merge will leave out repeats."""
        if self.source.deduplicate:
            yield from documents
            return
        n_tokens = 0
        for document in itertools.islice(documents, self.source.max_documents):
            yield document
            n_tokens += len(document[0].ids) + 1
            if self.source.max_tokens and n_tokens >= self.source.max_tokens:
                return


def _as_document(document: PipelineDocument) -> Document:
    """Return the document that goes into the store. A filter may have changed the text, which then decides its side."""
    original: Document = document.metadata["original"]
    is_key = original.split_key == original.text
    return Document(document.text, document.text if is_key else original.split_key)


_FILTERS = {
    "c4_quality": filters.C4QualityFilter,
    "fineweb_quality": filters.FineWebQualityFilter,
    "gopher_quality": filters.GopherQualityFilter,
    "gopher_repetition": filters.GopherRepetitionFilter,
    "language": filters.LanguageFilter,
    "regex": filters.RegexFilter,
}


def make_filters(wanted: dict[str, dict[str, Any]]) -> list[PipelineStep]:
    """Return datatrove's filters, in the order of the config.

    Raises:
        InputError: naming a setting that a filter does not have, or what a filter says of its settings.
    """
    return [_make_filter(name, settings) for name, settings in wanted.items()]


def _make_filter(name: str, settings: dict[str, Any]) -> PipelineStep:
    known = {k: p.default for k, p in inspect.signature(_FILTERS[name]).parameters.items() if k != "exclusion_writer"}
    for key, value in settings.items():
        if key not in known:
            raise InputError(f"data.filters.{name}.{key} is no setting of the filter; it has {', '.join(known)}")
        if isinstance(known[key], int | float) and not isinstance(value, int | float | None):
            raise InputError(f"data.filters.{name}.{key} must be like {known[key]}, its default, got {shown(value)}")
    try:
        return _FILTERS[name](**settings)
    except Exception as error:  # of datatrove, or of a pattern
        raise InputError(f"data.filters.{name} cannot be used: {' '.join(str(error).split())}") from None


def minhash_config(settings: NearDuplicatesConfig) -> MinhashConfig:
    """Return datatrove's settings; SHA-1 needs no further package, and xxhash only works in some versions."""
    return MinhashConfig(
        n_grams=settings.n_grams,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )


class Finish(PipelineStep):
    """Calls a function once, as the last stage."""

    type, name = "merge", "merge"

    def __init__(self, function: Callable[[], None], failures: Path) -> None:
        super().__init__()
        self.function, self.failures = function, failures

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Call the function."""
        with noted(self.failures, "merge", rank):
            self.function()
