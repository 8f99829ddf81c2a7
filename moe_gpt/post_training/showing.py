"""The stage that shows pictures to a finished text model, and lets what is new learn to answer.

The text model is frozen: cross-attention and the encoder alone learn, from the loss on the answers (Flamingo, arXiv
2204.14198, section 2). It runs as it does in use, without noise in routers and without capacities.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_gpt.config import RunConfig, SourceConfig
from moe_gpt.config.vision import PictureSourceConfig, SeeConfig
from moe_gpt.data.corpus import expand_files
from moe_gpt.data.prepare import PreparedData
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.model.losses import LossTerms
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import autocast, small_products
from moe_gpt.post_training.fitting import Limit, fitting, left_out
from moe_gpt.post_training.pictured import check_pictures, read_pictured, row_of
from moe_gpt.post_training.seeing import ENCODER, digest_of_encoder
from moe_gpt.post_training.starting import describe_forgetting, present, settle, split_items, text_of_pretraining
from moe_gpt.post_training.update import ItemOrder, Items, check_steps, count_step, rows_of_step, update
from moe_gpt.terminal.numbers import plural
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.stage import Say, Stage, Start
from moe_gpt.training.step import StepResult
from moe_gpt.vision.cross_attention import Seen, last_seen
from moe_gpt.vision.encoders import FolderEncoder
from moe_gpt.vision.examples import DRAWING, N_TRAINING, training_example
from moe_gpt.vision.pictured_text import Row, picture_mask
from moe_gpt.vision.seeing import SeeingModel, seeing_class

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

_GREY, _N_MEASURED = 128, 1000
Item = Row | tuple[str, int]
"""A row of a file; or the source and the number of an example that is drawn when it is needed."""


@dataclasses.dataclass(frozen=True)
class PicturedRows(Items):
    """Rows of text with pictures to learn from."""

    name = "pictures"
    encoder: str
    """Digest of the encoder's folder; empty for the small one."""
    notes: Sequence[str]

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The digests of pre-training's text, of the rows with their pictures, and of the encoder."""
        digest = hashlib.sha256()
        for item in (*self.items, *self.held_out):
            is_row = isinstance(item, Row)
            parts = [*item.text[:3], *(each.digest for each in item.text.pictures)] if is_row else [DRAWING, *item]
            digest.update(repr(parts).encode())
        own = {self.name: digest.hexdigest()} | ({ENCODER: self.encoder} if self.encoder else {})
        return {**self.data.fingerprint, **own}

    def describe(self, run: Run) -> Iterator[str]:
        """Yield lines for people."""
        yield (
            f"           {len(self.items):,} rows with pictures, about {run.passes[self.name]:.1f} passes; "
            f"{len(self.held_out):,} are held out"
        )
        yield from (f"           {note}" for note in self.notes)
        yield describe_forgetting(self.data)

    def row(self, item: Item) -> Row:
        """Return the row of an item."""
        return item if isinstance(item, Row) else row_of(training_example(*item), self.data.tokenizer)


def settle_seeing(config: RunConfig, start: Start, say: Say) -> tuple[RunConfig, Start]:
    """Give the config what it leaves out, and the encoder's folder its whole path, which later commands need."""
    see = present(config.see)
    if see.encoder != "small":
        folder = str(Path(see.encoder).absolute())
        see = dataclasses.replace(see, encoder=folder, size=see.size or FolderEncoder(folder).side)
    return settle(dataclasses.replace(config, see=see), start, say)


def prepare(config: RunConfig, start: Start, say: Say) -> PicturedRows:
    """Return the rows of a run, whose pictures are checked."""
    tokenizer, see = present(start.tokenizer), present(config.see)
    check_steps(config, 1, "a row")
    row_tokens = min(stage.seq_len for stage in config.schedule.stages)
    items, held_out, notes = list[Item](), list[Row](), list[str]()
    for source in see.sources:
        if source.builtin:
            _check_lengths(source.builtin, tokenizer, row_tokens)
            items += [(source.builtin, number) for number in range(N_TRAINING)]
        else:
            learnt, kept, told = _of_files(source, see, tokenizer, row_tokens, say)
            items, held_out, notes = [*items, *learnt], [*held_out, *kept], [*notes, *told]
    data = PreparedData(tokenizer, text_of_pretraining(config, tokenizer, say))
    return PicturedRows(data, items, held_out, row_tokens, digest_of_encoder(see.encoder), notes)


def _check_lengths(source: str, tokenizer: Tokenizer, row_tokens: int) -> None:
    """Raise ``InputError`` for rows that are too short for examples that are made offline."""
    examples = [training_example(source, number) for number in range(_N_MEASURED)]
    longest = max(len(row_of(example, tokenizer).text.ids) for example in examples)
    if longest > row_tokens:
        raise InputError(
            f"schedule.stages: seq_len must be at least {longest} for {source} with this tokenizer, got {row_tokens}"
        )


def _of_files(
    source: PictureSourceConfig, see: SeeConfig, tokenizer: Tokenizer, row_tokens: int, say: Say
) -> tuple[list[Row], list[Row], list[str]]:
    """Return rows for training, held-out ones, and notes."""
    found = read_pictured(expand_files(SourceConfig(name="pictures", files=source.files)), tokenizer)
    limit = Limit("the row has", row_tokens, "schedule.stages.0.seq_len", "see.on_too_long", see.on_too_long)
    fits, n_left_out = fitting(found, [len(row.text.ids) for row in found], [row.place for row in found], limit)
    say(f"reading {plural(sum(len(row.text.pictures) for row in fits), 'picture')} to the end")
    kept, remarks = check_pictures(fits)
    notes = [f"{plural(n, 'picture')}: {remark}" for remark, n in remarks.items()]
    notes += [f"rows of files{left_out(n_left_out)}"] * (n_left_out > 0)
    return *split_items(kept, lambda row: row.text.pictures[0].digest), notes


class Batch(NamedTuple):
    """Rows together, padded behind."""

    tokens: Int[Tensor, "B T"]
    is_learnt: Bool[Tensor, "B T"]
    """Which tokens are answers."""
    seen: Seen


def batch_of(rows: Sequence[Row], model: SeeingModel) -> Batch:
    """Return rows as tensors on the model's device, with the features of their pictures."""
    device = model.embedding.weight.device
    tokens = pad_sequence([torch.tensor(row.text.ids) for row in rows], batch_first=True)
    is_learnt = pad_sequence([torch.tensor(row.text.is_answer) for row in rows], batch_first=True)
    return Batch(tokens.to(device), is_learnt.to(device), seen_by(rows, model, tokens.shape[1]))


def seen_by(rows: Sequence[Row], model: SeeingModel, length: int, shift: int = 0) -> Seen:
    """Return what rows see.

    Args:
        rows: with their pictures.
        model: whose settings say whether it is blind.
        length: tokens of each row with padding.
        shift: by how many rows the pictures are moved on, among rows that have equally many.
    """
    device, pictures = model.embedding.weight.device, [row.text.pictures for row in rows]
    pictures = [*pictures[shift:], *pictures[:shift]]
    pixels = torch.stack([picture.pixels(model.settings.side) for of_row in pictures for picture in of_row])
    pixels = torch.full_like(pixels, _GREY) if model.settings.blind else pixels
    sees = last_seen(picture_mask([row.text.places for row in rows], length)).to(device)
    return model.seen(model.features(pixels.to(device)), [len(of_row) for of_row in pictures], sees)


def take_step(run: Run, plan: StepPlan, should_record: bool) -> StepResult:
    """Learn from the step's rows."""
    n_rows = rows_of_step(plan.batch_tokens, plan.seq_len, 1, "a row")
    assert isinstance(run.stream, ItemOrder), "it is that of the rows"
    assert isinstance(run.material, PicturedRows), "the stage has prepared them"
    numbers = run.stream.take(run.state.tokens_seen, n_rows)
    rows = [run.material.row(run.material.items[number]) for number in numbers]
    rows.sort(key=lambda row: (len(row.text.pictures), len(row.text.ids)))  # so that parts have little padding
    n_learnt = sum(sum(row.text.is_answer[1:]) for row in rows)
    n_together = max(1, run.config.train.micro_batch_tokens // plan.seq_len)
    run.state.model.eval()
    losses = [_learn(run, rows[first : first + n_together], n_learnt) for first in range(0, n_rows, n_together)]
    loss = torch.stack(losses).sum()
    result = update(run, plan.lr, LossTerms(loss, loss, torch.zeros_like(loss), torch.zeros_like(loss)), None)
    count_step(run, plan)
    return result


def _learn(run: Run, rows: Sequence[Row], n_learnt: int) -> Tensor:
    """Add the gradients of some rows; return their part of the mean loss on the step's answers."""
    model: Any = run.state.model
    with small_products(run.device):
        with autocast(run.device, run.precision):
            loss = answer_loss(model, batch_of(rows, model)) / n_learnt
        loss.backward()
    return loss.detach()


def answer_loss(model: SeeingModel, batch: Batch) -> Tensor:
    """Return the summed loss on the answers of a batch, in nats."""
    with model.looking(batch.seen):
        hidden = model.hidden_states(batch.tokens)[0]
    is_learnt = batch.is_learnt[:, 1:]
    return model.score(hidden[:, :-1][is_learnt], model.output.weight, batch.tokens[:, 1:][is_learnt]).total


def _with_eyes(config: RunConfig, model: MoEGPT) -> MoEGPT:
    return seeing_class(present(config.see)).from_model(model)


SEE = Stage(settle_seeing, prepare, _with_eyes, take_step)
