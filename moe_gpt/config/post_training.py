"""Settings of the stages after pre-training, each a section of a run's config (``moe-gpt finetune``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.data import Name
from moe_gpt.config.section import (
    Count,
    Flag,
    NonNegative,
    Positive,
    Problem,
    Real,
    Section,
    one_of,
    regular_expressions,
    unless,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationSourceConfig(Section):
    """One source of conversations: exactly one of builtin, files and dataset."""

    name: Name
    """Name of the source in messages: letters, digits, - and _."""
    builtin: Literal["calculator", "functions"] | None = None
    """Conversations that are made offline: sums with a calculator's calls, or questions on Python's own functions."""
    files: str | tuple[str, ...] | None = None
    """Paths or globs of .jsonl files with a conversation in each line (docs/from-base-to-chat.md)."""
    dataset: str | None = None
    """Name of a dataset on the Hugging Face hub, or a local folder, that has a column messages."""
    subset: str | None = None
    """The dataset's configuration name."""
    split: str = "train"
    """The dataset's split."""
    max_conversations: Count | None = None
    """Take at most this many conversations, the first ones."""

    def problems(self) -> Iterator[Problem]:
        """Yield keys that exclude each other."""
        yield from one_of(self, "builtin", "files", "dataset", needed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(Section):
    """Supervised fine-tuning on conversations. The model's shape and the tokenizer are those of --init-from."""

    sources: tuple[ConversationSourceConfig, ...]
    """The conversations; all are visited once in every epoch."""
    row_tokens: Count = 256
    """Tokens of a row, into which whole conversations are packed; the seq_len of every stage of the schedule."""
    on_too_long: Literal["error", "drop"] = "error"
    """What happens to conversations that are longer than a row: an error, or they are left out and counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig(Section):
    """Prompts whose answers are rewarded: exactly one of builtin and files."""

    builtin: Literal["lines"] | None = None
    """Beginnings of Python's own functions, up to return, which a line completes."""
    files: str | tuple[str, ...] | None = None
    """Paths or globs of .jsonl files with a prompt and an answer in each line; the model must have a chat template."""
    on_too_long: Literal["error", "drop"] = "error"
    """What happens to prompts that leave no room for an answer: an error, or they are left out and counted."""

    def problems(self) -> Iterator[Problem]:
        """Yield keys that exclude each other."""
        yield from one_of(self, "builtin", "files", needed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig(Section):
    """A rule that rewards an answer."""

    rule: Literal["parses", "uses_argument", "several_names", "right_answer"]
    """Of a line: it is Python and returns something, it also reads an argument, or it also has several names. Of an
    answer to a prompt of files: it is the right one."""
    weight: Real = 1.0
    """What the answer gets where the rule holds; elsewhere it gets 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig(Section):
    """Reinforcement. A step has batch_tokens / seq_len answers, and seq_len tokens are a prompt with its answer."""

    prompts: PromptsConfig
    """What is asked."""
    rewards: tuple[RuleConfig, ...]
    """Rules whose rewards are added up."""
    reward_model: str | None = None
    """Run or checkpoint of a reward model, whose scores count in place of the rules'. They are normalised on answers of
    the model at the start."""
    algorithm: Literal["grpo", "rloo", "ppo"] = "grpo"
    """What an answer is compared with: its prompt's mean, the mean of its prompt's others, or a value model."""
    samples: Count = 8
    """Answers to each prompt, at least 2."""
    max_new_tokens: Count = 16
    """Longest answer in tokens, its end included."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in learning."""
    kl_weight: NonNegative = 0.1
    """Weight of the KL to the model at the start, in units of reward per nat."""
    kl: Literal["k1", "k3"] = "k3"
    """Estimator of the KL in GRPO's loss; in rewards it is k1."""
    clip: Positive = 0.2
    """Largest distance of an importance ratio from 1 that still changes the loss."""
    importance: Literal["token", "sequence", "trajectory"] = "token"
    """Whether ratios are those of tokens, of sequences (GSPO), or of whole trajectories."""
    reduction: Literal["grpo", "dr_grpo", "bnpo", "dapo"] = "dr_grpo"
    """How tokens are averaged."""
    scale_rewards: Flag = False
    """Divide GRPO's advantages by the deviation of the prompt's rewards."""
    missing_end_reward: Real | None = None
    """Reward of an answer that does not end; null gives it what the rules say."""
    updates: Count = 1
    """Updates for each rollout; the experts of its tokens are then those of the first."""
    gamma: Positive = 1.0
    """PPO's discount."""
    lam: NonNegative = 0.95
    """PPO's lambda of generalised advantage estimation."""
    value_weight: NonNegative = 0.1
    """PPO's weight of the value loss."""
    pretraining_weight: NonNegative = 0.0
    """Weight of the loss on pre-training's text, of which each update then also reads batch_tokens (PPO-ptx)."""

    def problems(self) -> Iterator[Problem]:
        """Yield a single answer, which nothing can be compared with."""
        yield from unless(self.samples > 1, f"samples must be at least 2, got {self.samples}", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig(Section):
    """Pairs of answers: exactly one of builtin and files."""

    builtin: Literal["lines"] | None = None
    """Lines that the model at the start samples, of which one parses and the other does not."""
    files: str | tuple[str, ...] | None = None
    """Paths or globs of .jsonl files with prompt, chosen and rejected; the model must have a chat template."""
    n_prompts: Count = 512
    """Of builtin: prompts that are sampled for; about half of them give a pair or more."""
    samples: Count = 8
    """Of builtin: answers to each prompt."""
    max_new_tokens: Count = 16
    """Of builtin: longest answer in tokens, its end included."""
    on_too_long: Literal["error", "drop"] = "error"
    """What happens to pairs of files that are longer than seq_len: an error, or they are left out and counted."""

    def problems(self) -> Iterator[Problem]:
        """Yield keys that exclude each other."""
        yield from one_of(self, "builtin", "files", needed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """A reward model: the decoder with a number in the place of logits. A step has batch_tokens / seq_len / 2 pairs."""

    pairs: PairsConfig
    """What it learns from."""
    center: NonNegative = 0.01
    """Weight of the squared sum of a pair's scores, which keeps them around 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(Section):
    """Direct preference optimisation. A step has batch_tokens / seq_len / 2 pairs."""

    pairs: PairsConfig
    """What it learns from."""
    beta: Positive = 0.1
    """How strongly the model is held to the one at the start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptersConfig(Section):
    """Low-rank adapters (LoRA) in any stage after pre-training: they learn, and everything else is frozen."""

    rank: Count = 8
    """Rank of the difference to each adapted matrix, of each expert too."""
    alpha: Positive = 16.0
    """The difference is multiplied by alpha/rank."""
    targets: tuple[str, ...] = ("attention.*", "feed_forward.experts.*")
    """Matrices of a block that are adapted, where * stands for anything; the default leaves the router out."""
    also_train: tuple[str, ...] = ()
    """Regular expressions: parameters whose names match one of them learn in full beside the adapters. Rows of new
    special tokens learn with ["^embedding", "^output"]."""

    def problems(self) -> Iterator[Problem]:
        """Yield patterns that are no regular expressions, and no target."""
        yield from unless(bool(self.targets), "targets must name at least one matrix, got none", "targets")
        yield from regular_expressions(self, "also_train")
