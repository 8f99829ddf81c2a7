"""What the model reads: tokenizer, sources and their mixture."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from moe_gpt.config.section import Count, Flag, Fraction, Positive, Problem, Rate, Section, one_of, unless

Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", title="letters, digits, - and _")]
NonEmpty = Annotated[str, Field(min_length=1, title="text of at least one character")]
VocabularySize = Annotated[Count, Field(ge=257, le=10**7, title="a whole number from 257 (bytes, end-of-text) to 10^7")]

Part = Annotated[Positive, Field(le=1, title="a number above 0 and at most 1")]
Portion = Annotated[Positive, Field(le=1e9, title="a number above 0 and at most 10^9")]

PACKAGES = (
    "torch", "sympy", "pandas", "numpy", "matplotlib", "networkx", "fonttools", "datasets", "huggingface_hub",
    "pygments", "rich", "pydantic", "fsspec",
)  # fmt: skip
"""Installed wherever moe_gpt is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """The byte-level BPE tokenizer: trained on the sources, or given as a file."""

    vocab_size: VocabularySize = 4096
    """Size of the trained vocabulary, with end-of-text and the 256 bytes; ignored where file or hub is given."""
    file: str | None = None
    """Path of a tokenizer.json to use instead of training one."""
    hub: str | None = None
    """Repository on the Hugging Face hub whose tokenizer.json to use instead, such as openai-community/gpt2."""
    revision: str | None = None
    """Git revision of the repository in hub."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends every document; its id is 0 in a tokenizer that is trained here."""
    special_tokens: tuple[str, ...] = ()
    """Further special tokens with ids 1, 2, ..., such as <|fim_prefix|> or <|padding|>; no text encodes to them."""

    def problems(self) -> Iterator[Problem]:
        """Yield impossible vocabularies, and keys that exclude each other."""
        tokens, given = (self.end_of_text, *self.special_tokens), list(self.special_tokens)
        text = f"vocab_size must leave room for 256 bytes and {len(tokens)} special tokens, got {self.vocab_size}"
        yield from unless(self.vocab_size >= 256 + len(tokens), text, "vocab_size", "special_tokens")
        text = f"special_tokens must differ from each other and from end_of_text, and not be empty, got {given}"
        yield from unless(len({"", *tokens}) == 1 + len(tokens), text, "special_tokens", "end_of_text")
        for key in ("file", "hub"):
            text = f"special_tokens is for a tokenizer that is trained, got {given} with {key}; leave it out"
            yield from unless(not given or not getattr(self, key), text, "special_tokens", key)
        yield from one_of(self, "file", "hub")
        text = f"revision is for hub only, got {self.revision!r}; leave it out"
        yield from unless(bool(self.hub) or not self.revision, text, "revision", "hub")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One source of text and its share of the mixture: exactly one of builtin, files, dataset."""

    name: Name
    """Name of the source in metrics and folders: letters, digits, - and _."""
    builtin: Literal["prose", "code", "packages"] | None = None
    """Text that ships with Python: its documentation (prose) or the source code of its standard library (code); or the
    source code of installed packages."""
    packages: tuple[str, ...] = PACKAGES
    """Of builtin packages: their names; the default has large ones that moe_gpt needs itself."""
    files: str | tuple[str, ...] | None = None
    """Paths or globs of .jsonl, .json, .parquet, .csv, .tsv or UTF-8 text (one document per file); also as .gz, .zst,
    .xz or .bz2."""
    format: Literal["auto", "text", "lines", "json", "csv", "tsv", "parquet", "arrow"] = "auto"
    """What the files are; auto follows their names. lines is a JSON object in each line."""
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
    """The column that holds the text, in files with rows and in datasets."""
    template: str | None = None
    """Text made of several columns instead of text_field, such as "{question}\\n{answer}"; {{ and }} give braces."""
    min_chars: Count = 1
    """Documents with fewer characters are skipped."""
    errors: Literal["strict", "replace"] = "strict"
    """Treatment of bytes that are not UTF-8: strict raises an error, replace puts U+FFFD in their place."""
    deduplicate: Flag = False
    """Skip documents whose exact text has already occurred in this source."""
    part: Part = 1.0
    """Share of the documents to read, chosen by a hash of the text; a smaller part lies within a larger one."""
    max_documents: Count | None = None
    """Read at most this many documents."""
    max_tokens: Count | None = None
    """Stop reading after this many tokens, held-out tokens included."""
    epochs: Portion | None = None
    """Passes over the source in one big epoch; they set the source's share. 1 if no source has a weight."""
    weight: Portion | None = None
    """Share of the mixture, relative to the other sources' weights. Use it instead of epochs."""
    fim_rate: Rate = 0.0
    """Share of documents rearranged for fill-in-the-middle (arXiv 2207.14255); this needs special tokens."""
    fim_spm_rate: Rate = 0.5
    """Share of those documents in the order suffix, prefix, middle instead of prefix, suffix, middle."""
    prompt: NonEmpty = "The "
    """Prompt of the samples that evaluations generate."""

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between the keys of one source."""
        yield from one_of(self, "builtin", "files", "dataset", needed=True)
        yield from one_of(self, "epochs", "weight")
        yield from self._misplaced_keys()
        if self.template is not None:
            yield from self._template_problems()

    def _misplaced_keys(self) -> Iterator[Problem]:
        """Yield keys that have no effect on this kind of source."""
        for keys, has_effect, what in (
            (("subset", "split", "revision", "streaming"), self.dataset, "for a dataset: source only"),
            (("text_field", "template"), not self.builtin, "not for a builtin source"),
            (("packages",), self.builtin == "packages", "for builtin: packages only"),
            (("errors", "format"), self.files, "for a files: source only"),
        ):
            for key in keys:
                value = getattr(self, key)
                text = f"{key} is {what}, got {value!r}; leave it out"
                yield from unless(bool(has_effect) or value == getattr(SourceConfig, key), text, key)

    def _template_problems(self) -> Iterator[Problem]:
        text = f"text_field or template: give one, got text_field={self.text_field!r}, template={self.template!r}"
        yield from unless(self.text_field == "text", text, "text_field", "template")
        try:
            names = self.template_fields
        except ValueError as error:
            yield Problem(("template",), f"template must have its braces in pairs, got {self.template!r}: {error}")
            return
        text = f"template must name at least one column, as {{column}} without format, got {self.template!r}"
        yield from unless(bool(names) and all(map(str.isidentifier, names)), text, "template")

    @property
    def passes(self) -> float:
        """Passes over the source in one big epoch."""
        return self.epochs or 1.0

    @property
    def template_fields(self) -> tuple[str, ...]:
        """The columns in the template. A format or conversion stays in the name, so that it is refused."""
        parts = string.Formatter().parse(str(self.template))
        fields = (f"{name}:{spec}!{conversion}" for _, name, spec, conversion in parts if name is not None)
        return tuple(field.removesuffix(":!None") for field in fields)


FILTERS = ("c4_quality", "fineweb_quality", "gopher_quality", "gopher_repetition", "language", "regex")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicatesConfig(Section):
    """Near duplicates within a source, found by datatrove's MinHash; moe-gpt prepare --engine removes them."""

    remove: Flag = False
    """Keep one document of each group of documents that are nearly the same."""
    n_grams: Count = 5
    """Words of the pieces of text that are compared."""
    buckets: Count = 14
    """Groups of hashes. Documents that agree in all hashes of a group are near duplicates; more groups find more."""
    hashes_per_bucket: Count = 8
    """Hashes of a group; more of them ask for more similarity."""
    language: NonEmpty = "eng"
    """Language whose rules cut text into words, as datatrove names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What the model reads."""

    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    """How text becomes tokens."""
    sources: tuple[SourceConfig, ...] = (
        SourceConfig(name="prose", builtin="prose", epochs=1),
        SourceConfig(name="code", builtin="code", epochs=2, prompt="def "),
    )
    """The sources that are mixed."""
    processes: Count | None = None
    """Processes that tokenise a large source; null means one per core, at most 16."""
    cache_dir: str | None = None
    """Folder that keeps tokenised data for later runs; null means moe_gpt in the user's cache folder."""
    filters: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Filters of datatrove that documents must pass, in order, each with its settings, such as {gopher_quality:
    {min_doc_words: 20}}; moe-gpt prepare --engine applies them."""
    near_duplicates: NearDuplicatesConfig = dataclasses.field(default_factory=NearDuplicatesConfig)
    """Documents that are nearly the same as others of their source."""
    document_masking: Flag = False
    """Keep attention and targets within a document, in training and evaluation."""
    verify_tokens: Flag = True
    """Compare tokenised data with its digests when the data is first read; false compares only file sizes."""
    validation_fraction: Fraction = 0.03
    """Share of each source's documents held out, chosen by a hash of the document. 0 trains on all text; evaluate other
    files then."""
    validation_tokens: Count = 65_536
    """Tokens per source that an evaluation reads, from the start of the held-out part."""

    @property
    def cleaning(self) -> list[Any]:
        """What removes documents beside the settings of a source; empty if nothing does."""
        is_on = bool(self.filters) or self.near_duplicates.remove
        return [list(self.filters.items()), dataclasses.asdict(self.near_duplicates)] if is_on else []

    @property
    def has_weights(self) -> bool:
        """Whether weights set the sources' shares, instead of epochs."""
        return any(source.weight for source in self.sources)

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between the sources."""
        for name in self.filters:
            text = f"filters must have names from {', '.join(FILTERS)}, got {name!r}"
            yield from unless(name in FILTERS, text, "filters")
        names = [source.name for source in self.sources]
        for index, source in enumerate(self.sources):
            key = f"sources.{index}.name"
            yield from unless(source.name not in names[:index], f"{key} must be unique, got {source.name!r} again", key)
            key = f"sources.{index}.weight"
            text = f"{key} is required because other sources have a weight; give all sources weights, or all epochs"
            yield from unless(bool(source.weight) or not self.has_weights, text, key)
