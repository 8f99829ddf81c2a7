"""How a MoEGPT is spelled in Hugging Face's Mixtral, Llama and Mistral: names of tensors and keys of config.json.

One table serves both directions: every Hugging Face tensor is a slice of one of ours. The settings go through
``to_hugging_face`` and ``from_hugging_face``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import Tensor

from moe_gpt.config import ModelConfig
from moe_gpt.validation import ConfigError, InputError

_GROUPED_MM_WIDTH = 8  # rows of 16 bytes in bfloat16

ExpertLayout = Literal["per_expert", "fused"]


class Slice(NamedTuple):
    """Where a Hugging Face tensor lies in one of ours."""

    name: str
    """Our tensor."""
    expert: int | None = None
    """Its first index, where ours holds all experts and theirs one."""
    rows: tuple[int, int] | None = None
    """First row and the one after the last, of what is left; None is all."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of our tensor that theirs is."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


def tensor_table(config: ModelConfig, experts: ExpertLayout = "per_expert") -> dict[str, Slice]:
    """Return the slice of our weights that each Hugging Face tensor is, in the order of the layers.

    Args:
        config: the model; with ``attention_sharing`` several of their tensors are the same slice of ours.
        experts: ``per_expert`` is the form of the released Mixtral (w1 gate, w3 up, w2 down), which every reader
            knows; ``fused`` is how transformers 5 holds experts in memory.
    """
    table = {"model.embed_tokens.weight": Slice("embedding.weight")}
    for layer in range(config.n_layers):
        block, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        table[theirs + "input_layernorm.weight"] = Slice(block + "attention_norm.weight")
        table |= {theirs + "self_attn." + name: part for name, part in _attention(config, layer)}
        table[theirs + "post_attention_layernorm.weight"] = Slice(block + "feed_forward_norm.weight")
        rows = _dense(config) if config.is_dense else _fused(config) if experts == "fused" else _per_expert(config)
        table |= {theirs + name: part._replace(name=block + "feed_forward." + part.name) for name, part in rows}
    table["model.norm.weight"] = Slice("final_norm.weight")
    if not config.tie_embeddings:
        table["lm_head.weight"] = Slice("output.weight")
    return table


def _attention(config: ModelConfig, layer: int) -> Iterator[tuple[str, Slice]]:
    owner = layer - layer % config.attention_sharing
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    ends = [0, queries, queries + keys, queries + 2 * keys]
    for name, rows in zip(("q_proj", "k_proj", "v_proj"), zip(ends, ends[1:], strict=False), strict=True):
        yield f"{name}.weight", Slice(f"blocks.{owner}.attention.qkv.weight", rows=rows)
    yield "o_proj.weight", Slice(f"blocks.{owner}.attention.out.weight")


def _dense(config: ModelConfig) -> Iterator[tuple[str, Slice]]:
    yield "mlp.gate_proj.weight", Slice("gate_up.weight", rows=(0, config.d_ff))
    yield "mlp.up_proj.weight", Slice("gate_up.weight", rows=(config.d_ff, 2 * config.d_ff))
    yield "mlp.down_proj.weight", Slice("down.weight")


def _per_expert(config: ModelConfig) -> Iterator[tuple[str, Slice]]:
    yield "block_sparse_moe.gate.weight", Slice("router.weight")
    for expert in range(config.n_experts):
        name = f"block_sparse_moe.experts.{expert}."
        yield name + "w1.weight", Slice("experts.gate_up", expert, (0, config.d_ff))
        yield name + "w2.weight", Slice("experts.down", expert)
        yield name + "w3.weight", Slice("experts.gate_up", expert, (config.d_ff, 2 * config.d_ff))


def _fused(config: ModelConfig) -> Iterator[tuple[str, Slice]]:
    yield "mlp.gate.weight", Slice("router.weight")
    yield "mlp.experts.gate_up_proj", Slice("experts.gate_up")
    yield "mlp.experts.down_proj", Slice("experts.down")


def to_hugging_face(config: ModelConfig, load_balancing_loss_weight: float) -> dict[str, Any]:
    """Return the keys of config.json that say what a model computes: Mixtral's, or Llama's for a dense model.

    ``rope_theta`` is given twice: transformers 4 reads the flat key and ignores ``rope_parameters``, 5 prefers the
    latter. ``router_aux_loss_coef`` is our weight over top_k, because their loss is top_k times ours for one layer;
    for several they pool all layers' tokens before the product, which is another quantity, so the translation is
    exact for one layer only. Training with noise or a capacity leaves no trace: neither acts at inference.

    Raises:
        InputError: naming the settings that neither architecture has.
    """
    if not config.normalize_topk and not config.is_dense and config.top_k < config.n_experts:
        raise InputError(
            "model.normalize_topk must be true to be exported as Mixtral, got false: Mixtral rescales the weights of "
            f"the top_k={config.top_k} chosen experts to sum to 1, which is another function"
        )
    rope_theta = float(config.rope_theta)
    values = {
        "architectures": ["LlamaForCausalLM" if config.is_dense else "MixtralForCausalLM"],
        "model_type": "llama" if config.is_dense else "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if config.is_dense:
        return values | {"attention_bias": False, "mlp_bias": False}
    if config.d_model % _GROUPED_MM_WIDTH or config.d_ff % _GROUPED_MM_WIDTH:
        values["experts_implementation"] = "eager"  # what transformers 5 takes by default fails at these widths
    weight = load_balancing_loss_weight if config.balance == "loss" else 0.0
    return values | {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "router_aux_loss_coef": weight / config.top_k,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "sliding_window": None,
    }


# What transformers assumes where config.json leaves a key out, where its three classes differ or we need a value.
_COMMON = {"head_dim": None, "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02}
_MODEL_TYPES: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON
    | {"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072}
    | {"sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    "mistral": _COMMON
    | {"num_key_value_heads": 8, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072}
    | {"sliding_window": 4096},
    "llama": _COMMON
    | {"num_key_value_heads": None, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    | {"attention_bias": False, "mlp_bias": False},
}
_ARCHITECTURES = {"MixtralForCausalLM": "mixtral", "MistralForCausalLM": "mistral", "LlamaForCausalLM": "llama"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def from_hugging_face(values: dict[str, Any], max_seq_len: int | None = None) -> ModelConfig:
    """Return the config of the model that a config.json describes.

    Args:
        values: the contents of config.json.
        max_seq_len: the context to use instead of ``max_position_embeddings``.

    Raises:
        InputError: one line for each thing that is another architecture, missing, contradictory, or that this
            model does not have.
    """
    architecture, model_type = (values.get("architectures") or [None])[0], values.get("model_type")
    kind = _ARCHITECTURES.get(architecture) if architecture else model_type
    if kind not in _MODEL_TYPES or (model_type or kind) != kind:
        got = architecture if not model_type or architecture not in _ARCHITECTURES else f"{architecture}, {model_type}"
        raise InputError(f"architecture must be one of {', '.join(_ARCHITECTURES)}, got {got or model_type}")
    known = _MODEL_TYPES[kind] | values
    problems = [f"{key} is missing" for key in _REQUIRED if known.get(key) is None]
    if problems:
        raise InputError("\n".join(problems))
    rope_theta, rope_problems = _rope_theta(values, known["rope_theta"])
    context = max_seq_len or known["max_position_embeddings"]
    problems += [*rope_problems, *_differences(known, context)]
    if problems:
        raise InputError("\n".join(problems))
    n_experts, top_k = (known["num_local_experts"], known["num_experts_per_tok"]) if kind == "mixtral" else (1, 1)
    try:
        return ModelConfig(
            vocab_size=known["vocab_size"],
            n_layers=known["num_hidden_layers"],
            d_model=known["hidden_size"],
            n_heads=known["num_attention_heads"],
            n_kv_heads=known["num_key_value_heads"] or known["num_attention_heads"],
            head_dim=known["head_dim"] or known["hidden_size"] // known["num_attention_heads"],
            d_ff=known["intermediate_size"],
            n_experts=n_experts,
            top_k=top_k,
            tie_embeddings=known["tie_word_embeddings"],
            max_seq_len=context,
            rope_theta=rope_theta,
            norm_eps=known["rms_norm_eps"],
            init_std=known["initializer_range"],
        )
    except ConfigError as error:
        raise InputError(f"describes an impossible model: {'; '.join(error.problems)}") from None


def _rope_theta(values: dict[str, Any], default: float) -> tuple[float, list[str]]:
    """Return the base of the rotary frequencies and what is wrong with the keys that say it."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        return default, [f"rope_parameters and rope_scaling must be mappings, got {parameters!r} and {scaling!r}"]
    problems = []
    for key, given in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            problems.append(f"{key}.rope_type must be default, got {kind!r}: this model has no scaled rotary positions")
    given = {
        "rope_theta": values.get("rope_theta"),
        "rope_parameters.rope_theta": parameters.get("rope_theta"),
        "rope_scaling.rope_theta": scaling.get("rope_theta"),
    }
    found = {key: float(value) for key, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key}={value}" for key, value in found.items())
        problems.append(f"the rope settings disagree: {said}; versions of transformers differ in which they read")
    return next(iter(found.values()), default), problems


def _differences(known: dict[str, Any], context: int) -> Iterator[str]:
    """Yield what the described model computes and ours does not."""
    if known["hidden_act"] != "silu":
        yield f"hidden_act must be silu, got {known['hidden_act']!r}"
    for key in ("attention_bias", "mlp_bias"):
        if known.get(key):
            yield f"{key} must be false, got true: this model has no biases"
    for place in (known, known.get("rope_parameters") or {}):
        if place.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"partial_rotary_factor must be 1, got {place['partial_rotary_factor']}: positions rotate whole heads"
    if known.get("quantization_config"):
        yield "quantization_config must be absent: the weights must be float32, bfloat16 or float16"
    window = known.get("sliding_window")
    if window is not None and window < context:
        yield (
            f"sliding_window must be at least the context of {context} tokens, got {window}: every position sees the "
            f"whole context here; a max_seq_len of {window} or less uses it as it was made"
        )
    n_experts, top_k = known.get("num_local_experts"), known.get("num_experts_per_tok")
    if n_experts == 1:
        yield "num_local_experts must be at least 2, got 1: a model with one expert is a Llama"
    elif n_experts is not None and top_k == 1:
        yield (
            "num_experts_per_tok must be at least 2, got 1: Mixtral rescales that single weight to 1, and so the "
            "router gets no gradient"
        )
