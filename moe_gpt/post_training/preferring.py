"""The stages that learn from pairs of answers: a reward model, and direct preference optimisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_gpt.config import RunConfig, SourceConfig
from moe_gpt.config.post_training import PairsConfig
from moe_gpt.data.corpus import expand_files
from moe_gpt.data.prepare import PreparedData
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine
from moe_gpt.model.losses import LossTerms, RouterStats, combine_losses
from moe_gpt.model.transformer import MoEGPT, evaluating
from moe_gpt.ops.device import autocast
from moe_gpt.post_training.chat import TURN_END, mark, plain_text
from moe_gpt.post_training.conversations import read_pairs
from moe_gpt.post_training.fitting import Limit, fitting, left_out
from moe_gpt.post_training.lines import line_ends, line_prompts
from moe_gpt.post_training.pairs import PairOfAnswers, as_rollout, encode_pair, sampled_pairs
from moe_gpt.post_training.preferences import bradley_terry_loss, dpo_loss, implicit_rewards, sequence_log_probs
from moe_gpt.post_training.reward_model import RewardModel
from moe_gpt.post_training.rewards import parses
from moe_gpt.post_training.rollout import Rollout, score
from moe_gpt.post_training.scores import MOST_TOKENS, Score, greedy_answers, share
from moe_gpt.post_training.starting import (
    describe_forgetting,
    held_out_fraction,
    model_at_start,
    present,
    require_marks,
    settle,
    split_items,
    text_of_pretraining,
)
from moe_gpt.post_training.update import (
    ItemOrder,
    Items,
    check_steps,
    count_step,
    rows_of_step,
    total,
    update,
    weighted,
)
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.stage import Say, Stage, Start
from moe_gpt.training.step import StepResult

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run

_N_HELD_OUT_PROMPTS = 256
_AT_ONCE = 32
_ROWS = (2, "the answers of a pair")
"""Of a step there must be a multiple, and why."""


@dataclasses.dataclass(frozen=True)
class Pairs(Items):
    """Pairs of answers to learn from."""

    name = "pairs"
    reference: MoEGPT | None
    """The model at the start; None for a reward model, which needs none."""
    n_left_out: int = 0
    """Pairs that were left out."""

    def describe(self, run: Run) -> Iterator[str]:
        """Yield lines for people."""
        yield (
            f"           {len(self.items):,} pairs of answers, about {run.passes['pairs']:.1f} passes; "
            f"{len(self.held_out):,} are held out" + left_out(self.n_left_out)
        )
        if self.reference:
            yield describe_forgetting(self.data)


def prepare(config: RunConfig, start: Start, say: Say, with_reference: bool) -> Pairs:
    """Return the pairs of a run."""
    tokenizer = present(start.tokenizer)
    check_steps(config, *_ROWS)
    pairs, row_tokens = _section(config), min(stage.seq_len for stage in config.schedule.stages)
    model = model_at_start(start) if pairs.builtin or with_reference else None
    if model and pairs.builtin:
        training, held_out, n_left_out = _sampled(pairs, model, tokenizer, config, say)
    else:
        training, held_out, n_left_out = _read(pairs, tokenizer, row_tokens, str(config.stage))
    text = text_of_pretraining(config, tokenizer, say) if with_reference else ()
    data = PreparedData(tokenizer, text)
    return Pairs(data, training, held_out, 2 * row_tokens, model if with_reference else None, n_left_out)


def _section(config: RunConfig) -> PairsConfig:
    section = config.reward or config.dpo
    assert section, "the stage is that of the section"
    return section.pairs


def _sampled(
    pairs: PairsConfig, model: MoEGPT, tokenizer: Tokenizer, config: RunConfig, say: Say
) -> tuple[list[PairOfAnswers], list[PairOfAnswers], int]:
    """Return pairs for training and held-out ones; none is too long."""
    say("sampling lines of which one parses and one does not")
    fraction, sides = held_out_fraction(config.data), list[list[PairOfAnswers]]()
    for is_held_out, n in ((False, pairs.n_prompts), (True, _N_HELD_OUT_PROMPTS)):
        prompts, ends = line_prompts(is_held_out, fraction)[:n], line_ends(tokenizer)
        found = sampled_pairs(
            model, prompts, tokenizer, parses, ends, pairs.samples, pairs.max_new_tokens, config.train.seed
        )  # fmt: skip
        sides.append(list(found))
    if not sides[0]:
        raise InputError("no pair is left: of no prompt one sampled line parses and another one does not")
    return sides[0], sides[1], 0


def _read(
    pairs: PairsConfig, tokenizer: Tokenizer, row_tokens: int, stage: str
) -> tuple[list[PairOfAnswers], list[PairOfAnswers], int]:
    """Return the pairs of files for training, held-out ones, and how many are left out."""
    require_marks(tokenizer, "pairs of files")
    read = read_pairs(expand_files(SourceConfig(name="pairs", files=pairs.files)))
    encoded = [encode_pair(pair, tokenizer) for pair in read]
    limit = Limit(
        "prompt and longer answer have", row_tokens, "schedule.stages.0.seq_len", f"{stage}.pairs.on_too_long",
        pairs.on_too_long,
    )  # fmt: skip
    kept, n_left_out = fitting(encoded, [pair.length for pair in encoded], [pair.place for pair in read], limit)
    return *split_items(kept, lambda pair: repr(pair.prompt)), n_left_out


Compare = Callable[["Run", MoEGPT, Rollout], tuple[Tensor, Tensor, RouterStats | None]]
"""Returns the scores of chosen and rejected answers (N,), and the statistics of the routers."""


def by_reward(run: Run, model: MoEGPT, rollout: Rollout) -> tuple[Tensor, Tensor, RouterStats | None]:
    """Return the scores of a reward model."""
    assert isinstance(model, RewardModel), "the stage has made one"
    with autocast(run.device, run.precision):
        scores, output = model.scores(rollout.tokens, rollout.valid)
    chosen, rejected = scores.chunk(2)
    return chosen, rejected, output.router_stats


def by_log_probs(run: Run, model: MoEGPT, rollout: Rollout) -> tuple[Tensor, Tensor, RouterStats | None]:
    """Return the log-probabilities of whole answers, relative to the model at the start and times beta."""
    at_start, beta = present(_pairs(run).reference), present(run.config.dpo).beta
    scored = score(model, rollout, precision=run.precision)
    with torch.no_grad():
        reference = score(at_start.to(run.device), rollout, precision=run.precision).log_probs
    own, start = (sequence_log_probs(x, rollout.is_answer) for x in (scored.log_probs, reference))
    chosen, rejected = implicit_rewards(own, start, beta).chunk(2)
    return chosen, rejected, scored.router_stats


def take_step(run: Run, plan: StepPlan, should_record: bool, compare: Compare) -> StepResult:
    """Learn from the step's pairs."""
    n_pairs = rows_of_step(plan.batch_tokens, plan.seq_len, *_ROWS) // 2
    assert isinstance(run.stream, ItemOrder), "it is that of the pairs"
    pairs = [_pairs(run).items[number] for number in run.stream.take(run.state.tokens_seen, n_pairs)]
    n_together = max(1, run.config.train.micro_batch_tokens // plan.seq_len // 2)
    run.state.model.train()
    all_terms, all_stats, n_right = list[Tensor](), list[RouterStats](), 0.0
    for first in range(0, n_pairs, n_together):
        part = pairs[first : first + n_together]
        terms, stats, n = _learn(run, part, len(part) / n_pairs, compare)
        all_terms.append(torch.stack(terms).detach())
        all_stats += filter(None, [stats])
        n_right += n
    result = update(run, plan.lr, LossTerms(*torch.stack(all_terms).sum(0)), total(all_stats))
    count_step(run, plan)
    return result._replace(extras={"pair_accuracy": n_right / n_pairs})


def _learn(
    run: Run, pairs: Sequence[PairOfAnswers], share: float, compare: Compare
) -> tuple[LossTerms, RouterStats | None, float]:
    """Add the gradients of some pairs; return their part of the loss, and how many are in the right order."""
    chosen, rejected, stats = compare(run, run.state.model, as_rollout(pairs, run.device))
    stats = weighted(stats, share) if stats else None
    balancing, z_loss = stats[:2] if stats else (None, None)
    loss = share * _loss(run.config, chosen, rejected)
    terms = combine_losses(loss, balancing, z_loss, run.config.model, run.config.loss)
    terms.loss.backward()
    return terms, stats, float((chosen > rejected).sum())


def _loss(config: RunConfig, chosen: Tensor, rejected: Tensor) -> Tensor:
    if config.reward:
        return bradley_terry_loss(chosen, rejected, config.reward.center)
    none = torch.zeros_like(chosen)  # the scores are relative to the reference already
    return dpo_loss(chosen, rejected, none, none, beta=1.0)


@torch.no_grad()
def score_pairs(run: Run, model: MoEGPT) -> dict[str, Score]:
    """Return how many held-out pairs are in the right order, by the model and by the rule that the shorter one wins.

    A tie is no hit.
    """
    held_out, right = _pairs(run).held_out, list[bool]()
    with evaluating(model):
        for first in range(0, len(held_out), _AT_ONCE):
            right += _in_order(run, model, held_out[first : first + _AT_ONCE])
    shorter = [len(pair.chosen) < len(pair.rejected) for pair in held_out]
    return {"held_out_pairs": share(right), "shorter_wins": share(shorter)} if right else {}


def _in_order(run: Run, model: MoEGPT, pairs: Sequence[PairOfAnswers]) -> list[bool]:
    compare = by_reward if run.config.reward else by_log_probs
    chosen, rejected, _ = compare(run, model, as_rollout(pairs, run.device))
    return (chosen > rejected).tolist()


def pair_answers(run: Run, model: MoEGPT, n: int) -> list[dict[str, Any]]:
    """Return held-out pairs of at most ``n`` prompts as texts, with a reward model's scores, or DPO's own answer."""
    pairs = list({tuple(pair.prompt): pair for pair in _pairs(run).held_out}.values())[:n]
    text = functools.partial(plain_text, tokenizer=run.data.tokenizer)
    answers = (_both_scores if run.config.reward else _own_answers)(run, model, pairs) if pairs else []
    return [
        {"prompt": text(pair.prompt), "chosen": text(pair.chosen), "rejected": text(pair.rejected), "answer": answer}
        for pair, answer in zip(pairs, answers, strict=True)
    ]


@torch.no_grad()
def _both_scores(run: Run, model: MoEGPT, pairs: Sequence[PairOfAnswers]) -> list[str]:
    with evaluating(model):
        chosen, rejected, _ = by_reward(run, model, as_rollout(pairs, run.device))
    return [f"{a:.2f} / {b:.2f}" for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]


def _own_answers(run: Run, model: MoEGPT, pairs: Sequence[PairOfAnswers]) -> list[str]:
    """Return the most likely answer to each pair's prompt."""
    section, tokenizer = _section(run.config), run.data.tokenizer
    ends = line_ends(tokenizer) if section.builtin else {tokenizer.end_of_text_id, mark(TURN_END, tokenizer)}
    longest = section.max_new_tokens if section.builtin else MOST_TOKENS
    room = model.config.max_seq_len - max(len(pair.prompt) for pair in pairs)
    engine = Engine(model, precision=run.precision, is_exact=False)
    with evaluating(model):
        answers = greedy_answers(engine, [pair.prompt for pair in pairs], ends, min(longest, room))
    return [plain_text(answer.ids, tokenizer) for answer in answers]


def pair_rows(run: Run, n: int) -> list[list[int]]:
    """Return the tokens of the better answers of ``n`` held-out pairs, with their prompts."""
    return [[*pair.prompt, *pair.chosen] for pair in _pairs(run).held_out[:n]]


def _pairs(run: Run) -> Pairs:
    assert isinstance(run.material, Pairs), "the stage has prepared them"
    return run.material


def _with_scalar_head(config: RunConfig, model: MoEGPT) -> MoEGPT:
    return RewardModel.from_model(model)


REWARD = Stage(
    settle,
    functools.partial(prepare, with_reference=False),
    _with_scalar_head,
    functools.partial(take_step, compare=by_reward),
)
DPO = Stage(
    settle,
    functools.partial(prepare, with_reference=True),
    take_step=functools.partial(take_step, compare=by_log_probs),
)
