"""Every setting of a run: frozen, typed, checked when it is constructed.

A run is one ``RunConfig`` of eight sections. A default is written here and nowhere else; a number that follows
from others is a property. ``config_file`` reads and writes them as YAML.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections.abc import Iterator
from typing import Literal

from moe_gpt.validation import (
    AtMostOne,
    Count,
    CountOrZero,
    Flag,
    Fraction,
    NonNegative,
    Positive,
    Problem,
    Rate,
    Section,
    Seed,
    Share,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The shape of a MoEGPT and how its routers choose."""

    vocab_size: Count | None = None
    """Rows of the embedding; null follows the tokenizer. More than the tokenizer has is allowed, fewer is not."""
    n_layers: Count = 4
    """Transformer blocks."""
    d_model: Count = 128
    """Width of the residual stream."""
    n_heads: Count = 4
    """Query heads."""
    n_kv_heads: Count = 1
    """Key-value heads that the query heads share: 1 is multi-query, n_heads is full multi-head attention."""
    head_dim: Count = 32
    """Width of one head (even); n_heads x head_dim need not equal d_model."""
    d_ff: Count = 256
    """Hidden width of one expert (SwiGLU: three matrices of d_model x d_ff)."""
    n_experts: Count = 16
    """Experts per layer; 1 makes the feed-forward dense, without a router."""
    top_k: Count = 2
    """Experts that each token is sent to."""
    normalize_topk: Flag = True
    """Rescale the chosen experts' weights to sum to 1 (Mixtral does); refused for top_k 1 of several experts."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What keeps expert loads even: the Switch loss, the loss-free bias of arXiv 2408.15664, or nothing."""
    bias_update_rate: Positive = 1e-3
    """Step of the balancing bias, once per optimizer step (balance: bias; the paper's u, 1e-3)."""
    router_noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise on the router logits, in training only."""
    capacity_factor: Positive | None = None
    """Drop what exceeds this multiple of an expert's even share, in training only; null drops nothing."""
    attention_sharing: Count = 1
    """Consecutive layers that use one set of attention weights; must divide n_layers."""
    tie_embeddings: Flag = False
    """Use the embedding matrix as the output matrix too."""
    max_seq_len: Count = 256
    """Longest context in tokens, for training and generation."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights; projections into the residual use init_std / sqrt(2 n_layers)."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is impossible about the shape."""
        if self.n_heads % self.n_kv_heads:
            fitting = ", ".join(str(n) for n in range(1, self.n_heads + 1) if self.n_heads % n == 0)
            yield Problem(
                ("n_heads", "n_kv_heads"),
                f"n_heads must be a multiple of n_kv_heads, got n_heads={self.n_heads}, "
                f"n_kv_heads={self.n_kv_heads}; choose one of {fitting} for n_kv_heads",
            )
        if self.head_dim % 2:
            yield Problem(
                ("head_dim",),
                f"head_dim must be even for rotary positions, got {self.head_dim}; use {self.head_dim + 1}",
            )
        if self.top_k > self.n_experts:
            yield Problem(
                ("top_k", "n_experts"),
                f"top_k must be at most n_experts, got top_k={self.top_k}, n_experts={self.n_experts}; "
                f"use top_k={self.n_experts} or fewer, or more experts",
            )
        if self.normalize_topk and self.top_k == 1 and self.n_experts > 1:
            yield Problem(
                ("normalize_topk", "top_k", "n_experts"),
                f"normalize_topk must be false for top_k=1 of n_experts={self.n_experts}, got true: a single weight "
                "rescaled to 1 gives the router no gradient",
            )
        if self.n_layers % self.attention_sharing:
            fitting = ", ".join(str(n) for n in range(1, self.n_layers + 1) if self.n_layers % n == 0)
            yield Problem(
                ("attention_sharing", "n_layers"),
                f"attention_sharing must divide n_layers, got attention_sharing={self.attention_sharing}, "
                f"n_layers={self.n_layers}; choose one of {fitting}",
            )

    @property
    def is_dense(self) -> bool:
        """Whether every block has a single feed-forward network and no router."""
        return self.n_experts == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """The byte-level BPE tokenizer: trained on the sources, or given as a file."""

    vocab_size: Count = 4096
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
        """Yield what no byte-level tokenizer can be."""
        if self.vocab_size < 257:
            yield Problem(
                ("vocab_size",),
                f"vocab_size must be at least 257 (256 bytes and end-of-text), got {self.vocab_size}; use 2048, say",
            )
        elif self.vocab_size < 257 + len(self.special_tokens):
            text = f"vocab_size must leave room for 256 bytes and {1 + len(self.special_tokens)} special tokens"
            yield Problem(("vocab_size", "special_tokens"), f"{text}, got {self.vocab_size}")
        tokens = (self.end_of_text, *self.special_tokens)
        if len(set(tokens)) < len(tokens) or not all(tokens):
            text = f"special_tokens must differ from each other and from end_of_text, got {list(self.special_tokens)}"
            yield Problem(("special_tokens", "end_of_text"), text)
        given = [key for key in ("file", "hub") if getattr(self, key)]
        if len(given) > 1:
            yield Problem(("file", "hub"), f"file or hub: give one, got file={self.file!r}, hub={self.hub!r}")
        if self.special_tokens and given:
            text = f"special_tokens is for a tokenizer that is trained, got {list(self.special_tokens)} with {given[0]}"
            yield Problem(("special_tokens", given[0]), text)
        if self.revision and not self.hub:
            yield Problem(("revision", "hub"), f"revision is for hub only, got {self.revision!r}; leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One source of text and its share of the mixture: exactly one of builtin, files, dataset."""

    name: str
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
    """Shorter documents are passed over."""
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
    """Share of those in the order suffix, prefix, middle instead of prefix, suffix, middle."""
    prompt: str = "The "
    """What the sample at the end of training starts with."""

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between the keys of one source."""
        origins = {key: getattr(self, key) for key in ("builtin", "files", "dataset")}
        given = [key for key, value in origins.items() if value]
        if len(given) != 1:
            got = " and ".join(f"{key}={origins[key]!r}" for key in given) or "none of them"
            yield Problem(tuple(origins), f"builtin, files or dataset: give exactly one, got {got}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            yield Problem(("name",), f"name must be letters, digits, - and _, got {self.name!r}")
        if self.epochs and self.weight:
            yield Problem(
                ("epochs", "weight"), f"epochs or weight: give one, got epochs={self.epochs}, weight={self.weight}"
            )
        yield from self._misplaced_keys()
        if self.template is not None:
            yield from self._template_problems()
        if not self.prompt:
            yield Problem(("prompt",), "prompt must have at least one character, got ''")

    def _misplaced_keys(self) -> Iterator[Problem]:
        """Yield keys that mean nothing for this kind of source."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for keys, is_wrong, what in (
            (("subset", "split", "revision", "streaming"), not self.dataset, "for a dataset: source only"),
            (("text_field", "template"), bool(self.builtin), "not for a builtin source"),
            (("errors",), not self.files, "for a files: source only"),
        ):
            for key in keys if is_wrong else ():
                if getattr(self, key) != defaults[key]:
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
        """The columns that the template names; format specifications count as part of a name, so they are refused."""
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
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Problem((f"sources.{index}.name",), f"sources.{index}.name must be unique, got {name!r} again")
        if any(source.weight for source in self.sources):
            for index, source in enumerate(self.sources):
                if not source.weight:
                    yield Problem(
                        (f"sources.{index}.weight",),
                        f"sources.{index}.weight is required because other sources have a weight "
                        "(all sources have epochs, or all have weights)",
                    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Section):
    """One row of the curriculum: holds until that many tokens have been seen."""

    until_tokens: Count | None = None
    """tokens_seen at which the stage ends; null in the last row means one big epoch of the data."""
    seq_len: Count
    """Tokens per sequence."""
    batch_tokens: Count | tuple[Count, Count]
    """Tokens per optimizer step: a constant, or [first, last] of a linear ramp across the stage."""

    @property
    def batch_range(self) -> tuple[int, int]:
        """The batch size at the stage's start and at its end."""
        return self.batch_tokens if isinstance(self.batch_tokens, tuple) else (self.batch_tokens, self.batch_tokens)

    def problems(self) -> Iterator[Problem]:
        """Yield batch sizes that are not whole sequences."""
        for size in sorted(set(self.batch_range)):
            if size % self.seq_len:
                nearest = max(1, round(size / self.seq_len)) * self.seq_len
                yield Problem(
                    ("batch_tokens", "seq_len"),
                    f"batch_tokens must be a multiple of seq_len={self.seq_len}, got {size}; use {nearest}",
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The curriculum of sequence length and batch size, and the shape of the learning rate."""

    stages: tuple[StageConfig, ...] = (StageConfig(seq_len=256, batch_tokens=16_384),)
    """The stage table."""
    warmup_tokens: CountOrZero = 0
    """Tokens over which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "wsd", "none"] = "cosine"
    """How it falls to optimizer.min_lr: by a cosine, linearly at the end (warm-up, stable, decay), or never."""
    decay_fraction: AtMostOne = 0.2
    """Share of all tokens that the linear decay of wsd takes."""

    def problems(self) -> Iterator[Problem]:
        """Yield stages out of order and ends that whole sequences do not reach."""
        start = 0
        for index, stage in enumerate(self.stages):
            key, end = f"stages.{index}.until_tokens", stage.until_tokens
            if end is None:
                if index < len(self.stages) - 1:
                    yield Problem((key,), f"{key} may be null only in the last stage, got null in stage {index}")
                break
            if end <= start:
                yield Problem((key,), f"{key} must be greater than the previous stage's end {start}, got {end}")
            else:
                yield from self._unaligned_end(index, key, end)
            start = end
        total = self.stages[-1].until_tokens
        if total is not None and self.warmup_tokens >= total:
            yield Problem(
                ("warmup_tokens", "stages"),
                f"warmup_tokens must be below the run's {total} tokens, got {self.warmup_tokens}",
            )

    def _unaligned_end(self, index: int, key: str, end: int) -> Iterator[Problem]:
        """Yield a stage end that would leave part of a sequence, of its own length or of the next stage's."""
        seq_lens = [stage.seq_len for stage in self.stages[index : index + 2]]
        unit = math.lcm(*seq_lens)
        if end % unit:
            whose = f"seq_len={seq_lens[0]}" + (
                f" and of the next stage's seq_len={seq_lens[1]}" if seq_lens[1:] else ""
            )
            yield Problem(
                (key, f"stages.{index}.seq_len"),
                f"{key} must be a multiple of {whose}, got {end}; use {max(1, round(end / unit)) * unit}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101)."""

    lr: Positive = 3e-3
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    beta1: Fraction = 0.9
    """Decay of the running mean of gradients."""
    beta2: Fraction = 0.95
    """Decay of the running mean of squared gradients."""
    eps: Positive = 1e-8
    """Added to the root of the squared gradients' mean."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; norms, embeddings and the balancing bias do not decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""

    def problems(self) -> Iterator[Problem]:
        """Yield a learning rate that would rise at the end."""
        if self.min_lr > self.lr:
            yield Problem(("min_lr", "lr"), f"min_lr must be at most lr={self.lr}, got {self.min_lr}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Weights of the terms that are added to the cross entropy."""

    load_balancing_loss_weight: NonNegative = 0.01
    """Weight of the load-balancing loss, used with model.balance: loss (Switch: 0.01)."""
    router_z_loss_weight: NonNegative = 1e-3
    """Weight of the router z loss (ST-MoE: 1e-3)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How the run is executed and watched."""

    seed: Seed = 0
    """Fixes the initial weights, the order of the data and the noise."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type of the matrix products; auto is bf16 where the device is faster with it. Weights stay fp32."""
    micro_batch_tokens: Count = 16_384
    """Tokens that one forward pass may hold; larger batches accumulate gradients."""
    compile: Flag = False
    """Compile each block with torch.compile. For GPUs: on a CPU in fp32 the loop over experts recompiles."""
    activation_checkpointing: Flag = False
    """Recompute each block in the backward pass to save memory."""
    deterministic: Flag = False
    """Let a GPU repeat its own bits, at some speed, and refuse operations that cannot; a CPU always does."""
    eval_every_steps: CountOrZero = 0
    """Optimizer steps between evaluations; 0 evaluates at the start and the end only."""
    log_every_steps: Count = 10
    """Steps whose metrics are fetched from the device and written together."""
    record_every_steps: CountOrZero = 50
    """Optimizer steps between recordings of what the routers did and how large weights and updates are; 0 is never."""
    record_tokens: CountOrZero = 2048
    """Held-out tokens of each source whose experts and gradients every evaluation keeps, for reports; 0 is none."""
    sample_tokens: CountOrZero = 48
    """Tokens generated after each source's prompt at every evaluation; 0 is none."""
    report: Flag = True
    """Write report.html at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: CountOrZero = 500
    """Optimizer steps between checkpoints; 0 saves at the end only."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_best: Flag = True
    """Keep also the one with the lowest mean validation loss, among those saved right after an evaluation."""
    keep_every_steps: CountOrZero = 0
    """Keep also those whose step is a multiple of this; 0 keeps none for that."""
    in_background: Flag = True
    """Write while training goes on, from a copy of the state; at the end and at a signal training waits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultConfig(Section):
    """What to do about numerical faults. A step whose loss or gradient is not finite never moves the weights."""

    max_skips_in_a_row: Count = 10
    """Non-finite steps in a row after which the run goes back to its last good checkpoint and past these tokens."""
    max_rollbacks: CountOrZero = 3
    """How often a run may go back before it stops."""
    spike_window: Count = 200
    """Steps whose mean and standard deviation the loss is compared with."""
    spike_deviations: Positive = 8.0
    """Standard deviations above that mean at which the loss is called a spike, with a warning."""
    routing_window: Count = 200
    """Steps whose recordings are judged together: loads over the last so many, growth over three times as many."""
    dead_expert_load: Share = 0.01
    """Share of an even load below which an expert is called dead, with a warning."""
    collapsed_share: Share = 0.9
    """Share of all assignments above which the top_k busiest experts of a layer are called a collapse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """All settings of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The shape of the model."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """What it reads."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    """The curricula and the learning rate's shape."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """Weights of the auxiliary terms."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Execution."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Saving."""
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    """Numerical faults."""
    tracking: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics are sent besides the run's own files; tensorboard needs moe_gpt[track], wandb the package wandb."""

    def problems(self) -> Iterator[Problem]:
        """Yield what two sections disagree about."""
        for index, stage in enumerate(self.schedule.stages):
            key = f"schedule.stages.{index}.seq_len"
            for limit_key, limit in (
                ("model.max_seq_len", self.model.max_seq_len),
                ("train.micro_batch_tokens", self.train.micro_batch_tokens),
            ):
                if stage.seq_len > limit:
                    yield Problem((key, limit_key), f"{key} must be at most {limit_key}={limit}, got {stage.seq_len}")
        if self.schedule.stages[-1].until_tokens is None and any(source.weight for source in self.data.sources):
            key = f"schedule.stages.{len(self.schedule.stages) - 1}.until_tokens"
            yield Problem((key,), f"{key} is required when sources have weights: only epochs say how long a run is")
