"""Supervised fine-tuning: pre-training's step on packed conversations, with loss on the answers alone.

The model's shape, the tokenizer and the text on which forgetting is measured are those of ``--init-from``, where the
config does not give others. InstructGPT (arXiv 2203.02155, section 3.5) is the first stage's recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_gpt.config import ConversationSourceConfig, DataConfig, RunConfig, SftConfig, SourceConfig
from moe_gpt.data.corpus import describe_origin, expand_files, open_dataset
from moe_gpt.data.packing import FORMAT_VERSION, Rendered, Rows, RowStream, write_rows
from moe_gpt.data.prepare import PreparedData, build_once, usable_cache
from moe_gpt.data.token_store import dtype_of
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.post_training.builtin_sets import builtin_conversations
from moe_gpt.post_training.chat import PAD, TEMPLATE, Message, mark, render
from moe_gpt.post_training.conversations import Found, read_conversations, read_dataset
from moe_gpt.post_training.fitting import Limit, fitting, left_out
from moe_gpt.post_training.starting import describe_forgetting, held_out_fraction, present, settle, text_of_pretraining
from moe_gpt.training.stage import Material, Say, Stage, Start

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run


@dataclasses.dataclass(frozen=True)
class Conversations(Material):
    """Packed conversations to learn from. ``data`` has pre-training's text, on which forgetting is measured."""

    rows: Rows

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The digests of the rows and of pre-training's text."""
        return {**self.data.fingerprint, "conversations": self.rows.meta["digest"]}

    @property
    def names(self) -> list[str]:
        """The stream has one source."""
        return ["conversations"]

    @property
    def end_id(self) -> int:
        """The padding after a conversation, which therefore never sees another one of its row."""
        return mark(PAD, self.data.tokenizer)

    def shares(self, config: DataConfig) -> list[float]:
        """Return the tokens of an epoch."""
        return [self.rows.n_tokens]

    def stream(self, config: RunConfig, shares: Sequence[float]) -> RowStream:
        """Return the stream of rows."""
        return RowStream(self.rows, self.end_id, config.train.seed)

    def passes(self, shares: Sequence[float], total_tokens: int) -> dict[str, float]:
        """Return how often the run visits each conversation."""
        return {"conversations": total_tokens / self.rows.n_tokens}

    def describe(self, run: Run) -> Iterator[str]:
        """Yield lines for people."""
        meta, passes = self.rows.meta, f"about {run.passes['conversations']:.1f} passes"
        yield f"           {meta['n_conversations']:,} conversations, {meta['n_tokens']:,} tokens, {passes}"
        yield (
            f"           {meta['n_answer'] / meta['n_tokens']:.0%} of the tokens are answers, which are learned; "
            f"{meta['n_rows']:,} rows of {meta['row_tokens']:,} are {meta['n_tokens'] / self.rows.n_tokens:.0%} full"
        )
        yield from (f"           {note}" for note in meta["notes"])
        yield describe_forgetting(self.data)


def prepare(config: RunConfig, start: Start, say: Say) -> Conversations:
    """Return the packed conversations of a run, and the text on which forgetting is measured."""
    tokenizer = present(start.tokenizer)
    with usable_cache(config.data) as cache:
        rows = prepare_rows(present(config.sft), tokenizer, cache, held_out_fraction(config.data), say)
    return Conversations(PreparedData(tokenizer, text_of_pretraining(config, tokenizer, say)), rows)


SFT = Stage(functools.partial(settle, grows=True), prepare)


def prepare_rows(sft: SftConfig, tokenizer: Tokenizer, cache: Path, validation_fraction: float, say: Say) -> Rows:
    """Return the rows of the sources' conversations; pack them if they are not in the cache.

    Raises:
        InputError: naming file and row that cannot be used, or that are longer than a row of tokens.
    """
    origins = [_origin(source, validation_fraction) for source in sft.sources]
    text = json.dumps([FORMAT_VERSION, TEMPLATE, tokenizer.to_json(), dataclasses.asdict(sft), origins], default=str)
    folder = cache / "conversations" / hashlib.sha256(text.encode()).hexdigest()[:20]
    build = functools.partial(_build, sft, tokenizer, folder, validation_fraction, say)
    build_once([folder], "packing the same conversations", say, build)
    return Rows(folder)


def _origin(source: ConversationSourceConfig, validation_fraction: float) -> list[Any]:
    """Return what identifies a source's conversations without reading them."""
    if source.builtin:
        return [platform.python_version(), validation_fraction]
    if source.dataset:
        return [describe_origin(_of_dataset(source))]
    return [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(source)]


def _of_dataset(source: ConversationSourceConfig) -> SourceConfig:
    return SourceConfig(
        name=source.name,
        dataset=source.dataset,
        subset=source.subset,
        split=source.split,
        text_field="messages",
    )


def _files(source: ConversationSourceConfig) -> list[Path]:
    return expand_files(SourceConfig(name=source.name, files=source.files))


def _build(sft: SftConfig, tokenizer: Tokenizer, folder: Path, validation_fraction: float, say: Say) -> None:
    rendered, notes = list[Rendered](), list[str]()
    limit = Limit(
        "the conversation has", sft.row_tokens - 1, "sft.row_tokens - 1", "sft.on_too_long", sft.on_too_long
    )  # fmt: skip
    for source in sft.sources:
        say(f"reading the conversations of {source.name}")
        found = _read(source, validation_fraction)
        every = [render(conversation, tokenizer) for conversation in found.conversations]
        kept, n_dropped = fitting(every, [len(each.ids) for each in every], found.places, limit)
        forms = "".join(f", {n:,} in {form}" for form, n in found.n_of_form.items())
        notes.append(f"{source.name}: {len(kept):,} conversations{forms}")
        notes[-1] += left_out(n_dropped) + _repeated(found.conversations)
        rendered += kept
    write_rows(folder, rendered, mark(PAD, tokenizer), dtype_of(tokenizer), sft.row_tokens, notes)


def _repeated(conversations: Sequence[Sequence[Message]]) -> str:
    """Return how many conversations have two turns of a role in a row; results of tools may follow one another."""
    roles = [[message["role"] for message in messages] for messages in conversations]
    n = sum(any(a == b != "tool" for a, b in itertools.pairwise(each)) for each in roles)
    return f"; {n:,} with one role twice in a row, each turn kept as it is" if n else ""


def _read(source: ConversationSourceConfig, validation_fraction: float) -> Found:
    if source.builtin:
        made = builtin_conversations(source.builtin, False, validation_fraction)
        found = Found(made, [f"{source.name} conversation {number}" for number in range(1, len(made) + 1)], Counter())
    elif source.dataset:
        rows = itertools.islice(open_dataset(_of_dataset(source)), source.max_conversations)
        found = read_dataset(rows, source.dataset)
    else:
        found = read_conversations(_files(source))
    n = source.max_conversations
    return found._replace(conversations=found.conversations[:n], places=found.places[:n])
