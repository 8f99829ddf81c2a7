"""``moe-gpt finetune``: a stage after pre-training, with scores before and after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.train import NO_OPTIONS, TrainOptions, run_command
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.model.transformer import MoEGPT
    from moe_gpt.training.setup import Run


def finetune(config: str, *overrides: str, options: TrainOptions = NO_OPTIONS) -> int:
    """Train a stage after pre-training, save its model, and print scores before and after.

    The config's section is the stage and names its data: sft has conversations, reward and dpo have pairs of answers,
    rl has prompts and rewards, see has pictures with questions. All of them can be built-in sets or .jsonl files
    (docs/from-base-to-chat.md, docs/see-and-hear.md).

    Args:
        config: A YAML file, or the name of a config that comes with moe_gpt, such as tiny-chat.yaml.
        overrides: Settings that replace those of the file, as key.path=value.
    """
    return run_command("finetune", config, overrides, options)


def check_command(command: str, config: str, overrides: Sequence[str]) -> None:
    """Raise ``InputError`` for a config that is for the other command."""
    from moe_gpt.config.run import STAGES
    from moe_gpt.config.yaml import load_run_config

    stage = load_run_config(config, overrides).stage
    if command == "finetune" and stage is None:
        raise InputError(f"{config} must have a section of a stage, such as {', '.join(STAGES)}; or use moe-gpt train")
    if command == "train" and stage is not None:
        raise InputError(f"{config} has the section {stage}, which moe-gpt finetune reads, with --init-from")


def score_before(run: Run) -> None:
    """Write the scores of the model that a new run of a later stage starts with."""
    from moe_gpt.post_training.stages import write_findings

    model = None if run.config.stage is None or run.resumed_from else run.whole_model()
    if model:
        write_findings(run, model, "before")


def score_after(run: Run, model: MoEGPT | None) -> None:
    """Write and print the scores of a stage's model, and what it has forgotten; nothing after pre-training."""
    from moe_gpt.post_training.scores import format_scores
    from moe_gpt.post_training.stages import note_on_scores, write_findings

    if run.config.stage is None or model is None:
        return
    before, after = (_losses(run, step) for step in (0, run.state.step))
    values = write_findings(run, model, "after", forgetting={"before": before, "after": after})
    if values["after"]:
        print(f"\n{format_scores(values)}\n")
    for note in filter(None, (note_on_scores(run, values["after"]), note_on_rewards(run))):
        print(wrap(note))
    _say_what_was_forgotten(before, after)


def _losses(run: Run, step: int) -> dict[str, float]:
    """Return the loss on held-out text after a step, by source."""
    from moe_gpt.training.records.metrics import scores_at

    found = scores_at(run.run_dir / "metrics.jsonl", step)
    return {name: values["ce_loss"] for name, values in found.items()}


def _say_what_was_forgotten(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    for name in after:
        print(f"loss on held-out {name}, nats: {before.get(name, math.nan):.3f} before, {after[name]:.3f} after")


def note_on_rewards(run: Run) -> str:
    """Return that no step of GRPO or RLOO had rewards to compare; empty where one had, or in another stage."""
    from moe_gpt.training.records.metrics import read_metrics

    steps = [line for line in read_metrics(run.run_dir / "metrics.jsonl") if "flat_groups" in line]
    flat = [line["flat_groups"] for line in steps]
    if _compares_with_values(run) or sum(flat) < len(flat) or not flat:
        return ""
    n, moved = f"{len(flat):,}", sum(line["grad_norm"] for line in steps)
    return f"note: no answer got another reward than the others of its prompt in {n} of {n} steps; {_END[moved > 0]}"


_END = {False: "nothing was learned, and no weight has moved", True: "only the KL moved the weights"}


def _compares_with_values(run: Run) -> bool:
    return bool(run.config.rl and run.config.rl.algorithm == "ppo")


def next_after_stage(run: Run) -> list[str]:
    """Return commands that use the model of a stage after pre-training."""
    from moe_gpt.post_training.chat import can_chat

    if run.config.reward:
        start, setting = run.identity.initialised_from, f"rl.reward_model={run.run_dir}"
        return [command_line("finetune", "tiny-ppo.yaml", "--init-from", start, setting)]
    if see := run.config.see:
        prompt = {"digits": "The digits are", "scenes": "The picture shows", None: "PROMPT"}[see.sources[0].builtin]
        return [command_line("generate", run.run_dir, "--prompt", prompt, "--image", "FILE")]
    if not can_chat(run.config.stage, run.data.tokenizer):
        return [command_line("generate", run.run_dir, "--prompt", "def ")]
    return [command_line("chat", run.run_dir), command_line("serve", run.run_dir)]
