"""What a run is, in words, before it starts."""

from __future__ import annotations

from moe_gpt.measure.flops import stage_tokens, training_flops
from moe_gpt.measure.memory import checkpoint_bytes, needed_memory
from moe_gpt.measure.parameters import ParameterCounts, count_parameters
from moe_gpt.ops.device import describe_device
from moe_gpt.terminal.numbers import format_value
from moe_gpt.training.setup import Run


def describe_run(run: Run) -> str:
    """Return what will be trained: parameters, data, stages, device and precision."""
    model, counts = run.config.model, count_parameters(run.config.model)
    experts = "dense" if model.is_dense else f"{model.n_experts} experts, top-{model.top_k}, balance by {model.balance}"
    total = sum(parameter.numel() for parameter in run.state.model.parameters())  # routers of one's own included
    lines = [
        f"model      {total:,} parameters, {counts.active + total - counts.total:,} active per token; "
        f"{model.n_layers} layers of width {model.d_model}, {model.n_heads} query heads on {model.n_kv_heads} key-value"
        f", {experts}",
        f"data       vocabulary {run.data.tokenizer.vocab_size:,}",
    ]
    for source in run.data.sources:
        name = source.config.name
        lines.append(
            f"           {name}: {len(source.train):,} training and {len(source.validation):,} held-out tokens; "
            f"this run passes over it {run.passes[name]:.2f} times"
        )
    lines.append(f"schedule   {run.schedule.total_tokens:,} tokens{_big_epochs(run)}")
    for stage in run.schedule.stages:
        first, last = stage.config.batch_range
        batch = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        lines.append(f"           until {stage.end:>12,}: sequences of {stage.config.seq_len}, {batch} tokens a step")
    lines.append(_describe_cost(run, counts))
    lines.append(f"device     {describe_device(run.device)}, {run.precision}")
    lines.append(f"run        {run.run_dir}" + (f", from step {run.state.step}" if run.state.step else ""))
    if run.identity.initialised_from:
        lines.append(f"           started with the weights of {run.identity.initialised_from}")
    return "\n".join(lines)


def _big_epochs(run: Run) -> str:
    """Return how many big epochs the schedule is; nothing where sources have weights instead of epochs."""
    if any(source.config.weight for source in run.data.sources):
        return ""
    big_epoch = sum((source.config.epochs or 1.0) * len(source.train) for source in run.data.sources)
    return f", {run.schedule.total_tokens / big_epoch:.2f} big epochs"


def _describe_cost(run: Run, counts: ParameterCounts) -> str:
    """Return what the run takes, from its plan; moe-gpt plan says more."""
    flops = training_flops(run.config.model, stage_tokens(run.config.schedule), counts)
    memory = needed_memory(run.config, run.device, run.precision, counts)
    return (
        f"plan       {format_value(flops, 'FLOPs')} in matrix products; training takes {memory.shown()} of memory, "
        f"a checkpoint {format_value(checkpoint_bytes(run.config.model).total, 'bytes')}"
    )
