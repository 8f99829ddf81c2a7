"""What the model reads: tokenizer, sources and their mixture."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from moe_gpt.config.section import Count, Flag, Positive, Problem, Rate, Section, Share, one_of

Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", title="letters, digits, - and _")]
NonEmpty = Annotated[str, Field(min_length=1, title="text of at least one character")]
VocabularySize = Annotated[Count, Field(ge=257, title="a whole number of at least 257 (256 bytes and end-of-text)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """The byte-level BPE tokenizer: trained on the sources, or given as a file."""

    vocab_size: VocabularySize = 4096
    """Tokens to train, end-of-text and the 256 bytes included; ignored where file or hub is given."""
    file: str | None = None
    """Path of a tokenizer.json to use instead of training one."""
    hub: str | None = None
    """Repository on the Hugging Face hub whose tokenizer.json to use instead, such as openai-community/gpt2."""
    revision: str | None = None
    """That repository's git revision."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends every document; its id is 0 in a tokenizer that is trained here."""
    special_tokens: tuple[str, ...] = ()
    """More tokens that no text can spell, ids 1, 2, ...: padding, chat roles, <|fim_prefix|> and the like."""

    def problems(self) -> Iterator[Problem]:
        """Yield what no byte-level tokenizer can be, and keys that do not go together."""
        yield from self._special_token_problems()
        yield from one_of(self, "file", "hub")
        if self.revision and not self.hub:
            yield Problem(("revision", "hub"), f"revision is for hub only, got {self.revision!r}; leave it out")

    def _special_token_problems(self) -> Iterator[Problem]:
        tokens, given = (self.end_of_text, *self.special_tokens), list(self.special_tokens)
        if self.vocab_size < 256 + len(tokens):
            text = f"vocab_size must leave room for 256 bytes and {len(tokens)} special tokens, got {self.vocab_size}"
            yield Problem(("vocab_size", "special_tokens"), text)
        if len({"", *tokens}) < 1 + len(tokens):
            text = f"special_tokens must differ from each other and from end_of_text, got {given}"
            yield Problem(("special_tokens", "end_of_text"), text)
        if given and (self.file or self.hub):
            key = "file" if self.file else "hub"
            text = f"special_tokens is for a tokenizer that is trained, got {given} with {key}"
            yield Problem(("special_tokens", key), text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One source of text and its share of the mixture: exactly one of builtin, files, dataset."""

    name: Name
    """What metrics and folders call the source: letters, digits, - and _."""
    builtin: Literal["prose", "code"] | None = None
    """Text that ships with Python: its documentation (prose) or its standard library's sources (code)."""
    files: str | tuple[str, ...] | None = None
    """Paths or globs: .jsonl, .parquet, .csv, else UTF-8 text, one document a file; also compressed: .gz, .zst."""
    dataset: str | None = None
    """Name of a dataset on the Hugging Face hub, or a local folder, for datasets.load_dataset."""
    subset: str | None = None
    """The dataset's configuration name."""
    split: str = "train"
    """The dataset's split."""
    revision: str | None = None
    """The dataset's git revision; give one to pin the data."""
    streaming: Flag = True
    """Read the dataset while tokenising instead of downloading all of it first."""
    text_field: str = "text"
    """The column that holds the text (jsonl, parquet, csv, dataset)."""
    template: str | None = None
    """Text made of several columns instead, such as "{question}\\n{answer}"; {{ and }} are braces."""
    min_chars: Count = 1
    """Documents with fewer characters are skipped."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes of files that are not UTF-8: an error, or U+FFFD in their place."""
    deduplicate: Flag = False
    """Read a document only where its exact text has not come before in this source."""
    max_documents: Count | None = None
    """Read at most this many documents."""
    max_tokens: Count | None = None
    """Stop reading after this many tokens, the validation part included."""
    epochs: Positive | None = None
    """Passes over the source in one big epoch, which sets its share; default 1 where no source has a weight."""
    weight: Positive | None = None
    """Share of the mixture relative to the other sources' weights, instead of epochs."""
    fim_rate: Rate = 0.0
    """Share of documents rearranged for fill-in-the-middle (arXiv 2207.14255); the tokenizer needs its sentinels."""
    fim_spm_rate: Rate = 0.5
    """Share of those documents in the order suffix, prefix, middle instead of prefix, suffix, middle."""
    prompt: NonEmpty = "The "
    """What the samples at evaluations start with."""

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between the keys of one source."""
        yield from one_of(self, "builtin", "files", "dataset", needed=True)
        yield from one_of(self, "epochs", "weight")
        yield from self._misplaced_keys()
        if self.template is not None:
            yield from self._template_problems()

    def _misplaced_keys(self) -> Iterator[Problem]:
        """Yield keys that mean nothing for this kind of source."""
        for keys, is_wrong, what in (
            (("subset", "split", "revision", "streaming"), not self.dataset, "for a dataset: source only"),
            (("text_field", "template"), bool(self.builtin), "not for a builtin source"),
            (("errors",), not self.files, "for a files: source only"),
        ):
            for key in keys if is_wrong else ():
                if getattr(self, key) != getattr(SourceConfig, key):
                    yield Problem((key,), f"{key} is {what}, got {getattr(self, key)!r}; leave it out")

    def _template_problems(self) -> Iterator[Problem]:
        if self.text_field != "text":
            text = f"text_field or template: give one, got text_field={self.text_field!r}, template={self.template!r}"
            yield Problem(("text_field", "template"), text)
        try:
            names = self.template_fields
        except ValueError as error:
            yield Problem(("template",), f"template must have its braces in pairs, got {self.template!r}: {error}")
            return
        if not names or not all(name.isidentifier() for name in names):
            text = f"template must name at least one column, as {{column}} and nothing more, got {self.template!r}"
            yield Problem(("template",), text)

    @property
    def template_fields(self) -> tuple[str, ...]:
        """The columns that the template names. A format or conversion stays part of its name, so that it is refused."""
        parts = string.Formatter().parse(self.template or "")
        return tuple(
            name + (f":{spec}" if spec else "") + (f"!{conversion}" if conversion else "")
            for _, name, spec, conversion in parts
            if name is not None
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What the model reads."""

    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    """How text becomes tokens."""
    sources: tuple[SourceConfig, ...] = (
        SourceConfig(name="prose", builtin="prose", epochs=1),
        SourceConfig(name="code", builtin="code", epochs=2, prompt="def "),
    )
    """The mixture."""
    processes: Count | None = None
    """Processes that tokenise a large source; null is one for each core, at most 16."""
    cache_dir: str | None = None
    """Where tokenised data is kept and found again; null is moe_gpt in the user's cache folder."""
    document_masking: Flag = False
    """Let tokens see their own document only, in training and evaluation; no target then crosses a document's end."""
    verify_tokens: Flag = True
    """Compare tokenised data with its digests when it is first read; otherwise only the sizes of its files."""
    validation_fraction: Share = 0.03
    """Share of each source's documents held out, chosen by a hash of the document."""
    validation_tokens: Count = 65_536
    """Tokens per source that an evaluation reads, from the start of the held-out part."""

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between the sources."""
        names = [source.name for source in self.sources]
        has_weights = any(source.weight for source in self.sources)
        for index, source in enumerate(self.sources):
            if source.name in names[:index]:
                key = f"sources.{index}.name"
                yield Problem((key,), f"{key} must be unique, got {source.name!r} again")
            if has_weights and not source.weight:
                key = f"sources.{index}.weight"
                text = "is required because other sources have a weight (all sources have epochs, or all have weights)"
                yield Problem((key,), f"{key} {text}")
