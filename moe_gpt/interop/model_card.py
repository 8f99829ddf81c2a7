"""The README.md of an exported model, filled from its run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moe_gpt.config import RunConfig, SourceConfig
from moe_gpt.measure.parameters import count_parameters


class Training(NamedTuple):
    """What is known about how a model was trained."""

    config: RunConfig
    """Of the run, as saved with the checkpoint."""
    step: int
    """Optimizer steps that the weights have seen."""
    tokens_seen: int
    """Tokens that they have seen."""
    scores: Mapping[str, Mapping[str, float]]
    """Per source, ``ce_loss`` in nats per token and ``bits_per_byte`` on held-out text; empty where not evaluated."""
    started_from: str | None = None
    """The model whose weights the run started with."""


def model_card(name: str, training: Training, dtype: str, licence: str) -> str:
    """Return a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        name: what the model is called.
        training: the run it comes from.
        dtype: of the weights in the files.
        licence: an identifier that the hub knows, or "unknown".
    """
    return "\n".join([*_front_matter(training.config, licence), *_body(name, training, dtype)]) + "\n"


def _front_matter(config: RunConfig, licence: str) -> Iterator[str]:
    yield from ("---", f"license: {licence}", "library_name: transformers", "pipeline_tag: text-generation", "tags:")
    yield from ("- moe_gpt", *(("- llama",) if config.model.is_dense else ("- moe", "- mixtral")), "---", "")


def _body(name: str, training: Training, dtype: str) -> Iterator[str]:
    config = training.config
    model = config.model
    counts = count_parameters(dataclasses.replace(model, attention_sharing=1))  # written once for each layer
    kind = "dense" if model.is_dense else f"mixture-of-experts ({model.n_experts} per layer, top-{model.top_k})"
    yield f"# {name}\n"
    yield (
        f"A {kind} decoder of {counts.total:,} parameters, {counts.active:,} of them used for a token, trained with "
        f"moe_gpt on {training.tokens_seen:,} tokens ({training.step:,} steps)."
    )
    if training.started_from:
        yield f"Its weights started from {training.started_from}."
    yield "A base model: it continues text, and it answers nothing reliably.\n"
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield f"folder = {json.dumps(name)}  # where this folder is, or its name on the hub"
    yield "model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))"
    yield f'ids = tokenizer({json.dumps(config.data.sources[-1].prompt)}, return_tensors="pt")'
    yield "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50, do_sample=True)[0]))"
    yield "```\n"
    yield "## Architecture\n"
    heads = f"{model.n_heads} heads of {model.head_dim}, {model.n_kv_heads} key-value"
    experts = "none (dense)" if model.is_dense else f"{model.n_experts}, top-{model.top_k}"
    vocabulary = f"{model.vocab_size}, tied" if model.tie_embeddings else model.vocab_size
    shape = (model.n_layers, model.d_model, heads, model.d_ff, experts, vocabulary, model.max_seq_len)
    yield from _table(
        ("layers", "d_model", "attention", "d_ff", "experts", "vocabulary", "context", "rope_theta", "weights"),
        [(*shape, f"{model.rope_theta:g}", dtype)],
    )
    if model.attention_sharing > 1:
        yield f"\nIn training every {model.attention_sharing} layers shared one set of attention weights."
    yield "\n## Training data\n"
    yield from _table(("source", "from", "share"), [(s.name, _origin(s), _share(s)) for s in config.data.sources])
    end = config.data.tokenizer.end_of_text
    yield (
        f"\nEvery document ends with `{end}`. The tokenizer adds no tokens of its own; unlike in training, text that "
        f"spells `{end}` becomes that token, as is usual in transformers.\n"
    )
    yield "## Schedule\n"
    yield from _table(
        ("until tokens", "sequence length", "tokens per step"),
        [
            (f"{stage.until_tokens:,}" if stage.until_tokens else "the end", stage.seq_len, _range(stage.batch_range))
            for stage in config.schedule.stages
        ],
    )
    optimizer = config.optimizer
    yield (
        f"\nAdamW, peak learning rate {optimizer.lr:g}, warm-up over {config.schedule.warmup_tokens:,} tokens, decay "
        f"`{config.schedule.decay}` to {optimizer.min_lr:g}, weight decay {optimizer.weight_decay:g}, seed "
        f"{config.train.seed}."
    )
    if not model.is_dense:
        yield f"Balance: {_balance(config)}; router z loss with weight {config.loss.router_z_loss_weight:g}."
    if model.router_noise:
        yield f"Noise of standard deviation {model.router_noise:g} on the router logits in training only."
    if model.capacity_factor:
        yield f"Training dropped tokens beyond {model.capacity_factor:g} times an expert's share; using it does not."
    yield "\n## Held-out text\n"
    if training.scores:
        yield from _table(
            ("source", "cross entropy, nats per token", "bits per byte"),
            [(source, f"{s['ce_loss']:.4f}", f"{s['bits_per_byte']:.4f}") for source, s in training.scores.items()],
        )
    else:
        yield "The run was not evaluated at this step."


def _table(head: tuple[str, ...], rows: list[tuple]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _origin(source: SourceConfig) -> str:
    if source.builtin:
        return {"prose": "Python's documentation", "code": "Python's standard library"}[source.builtin]
    if source.files:
        patterns = (source.files,) if isinstance(source.files, str) else source.files
        return "files: " + ", ".join(pattern.replace("\\", "/").rpartition("/")[2] for pattern in patterns)
    parts = (source.dataset, source.subset, source.split, source.revision)
    return "dataset: " + ", ".join(part for part in parts if part)


def _share(source: SourceConfig) -> str:
    return f"weight {source.weight:g}" if source.weight else f"{source.epochs or 1:g} x per big epoch"


def _range(batch: tuple[int, int]) -> str:
    first, last = batch
    return f"{first:,}" if first == last else f"{first:,} rising to {last:,}"


def _balance(config: RunConfig) -> str:
    match config.model.balance:
        case "loss":
            return f"load-balancing loss with weight {config.loss.load_balancing_loss_weight:g}"
        case "bias":
            return "loss-free bias"
    return "none"
