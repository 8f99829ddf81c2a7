"""The tensor names and config.json keys of Hugging Face's Mixtral, Llama and Mistral.

One table serves import and export: every Hugging Face tensor is a slice of one of ours. ``to_hugging_face`` and
``from_hugging_face`` translate the settings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from moe_gpt.config import ModelConfig
from moe_gpt.config.model import Layers
from moe_gpt.config.section import Count, Flag, Positive, Problem, Section, annotations_of, section_in, unless
from moe_gpt.errors import InputError, shown

_GROUPED_MM_WIDTH = 8  # rows of 16 bytes in bfloat16

ExpertLayout = Literal["per_expert", "fused"]


class Slice(NamedTuple):
    """The part of one of our tensors that is a Hugging Face tensor."""

    name: str
    """The name of our tensor."""
    expert: int | None = None
    """The expert, if our tensor holds all experts and theirs holds one."""
    rows: tuple[int, int] | None = None
    """The rows [first, last + 1); None is all of them."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of our tensor, as a view."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


def tensor_table(config: ModelConfig, experts: ExpertLayout = "per_expert") -> dict[str, Slice]:
    """Map each Hugging Face tensor to its slice of our weights, in the order of the layers.

    Args:
        config: with ``attention_sharing``, several of their tensors are the same slice of ours.
        experts: ``per_expert`` is the layout of the released Mixtral (w1 gate, w3 up, w2 down), which every reader
            knows; ``fused`` is the layout of transformers 5 in memory.
    """
    table = {"model.embed_tokens.weight": Slice("embedding.weight")}
    for layer in range(config.n_layers):
        table |= {f"model.layers.{layer}.{name}": part for name, part in _layer(config, layer, experts)}
    table["model.norm.weight"] = Slice("final_norm.weight")
    if not config.tie_embeddings:
        table["lm_head.weight"] = Slice("output.weight")
    return table


def _layer(config: ModelConfig, layer: int, experts: ExpertLayout) -> Iterator[tuple[str, Slice]]:
    block = f"blocks.{layer}."
    yield "input_layernorm.weight", Slice(block + "attention_norm.weight")
    for name, part in _attention(config, layer):
        yield "self_attn." + name, part
    yield "post_attention_layernorm.weight", Slice(block + "feed_forward_norm.weight")
    for name, part in _FEED_FORWARD["dense" if config.is_dense else experts](config):
        yield name, part._replace(name=block + "feed_forward." + part.name)


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


_FEED_FORWARD = {"dense": _dense, "fused": _fused, "per_expert": _per_expert}
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
"""Keys of config.json that have the same values as our settings."""


def to_hugging_face(config: ModelConfig, load_balancing_loss_weight: float) -> dict[str, Any]:
    """Return the keys of config.json that define the model's function: a Mixtral's, or a Llama's if it is dense.

    ``rope_theta`` appears twice: transformers 4 reads the flat key and ignores ``rope_parameters``; transformers 5
    prefers the latter. ``router_aux_loss_coef`` is our weight over top_k, because their loss is top_k times ours for
    one layer. For several layers the two losses differ (theirs pools the tokens of all layers before the product), so
    the translation is exact for one layer only. Router noise and capacity have no keys, because neither acts at
    inference.
    """
    if not config.normalize_topk and config.top_k < config.n_experts:
        raise InputError(
            "model.normalize_topk must be true to be exported as Mixtral, got false: Mixtral rescales the weights of "
            f"the top_k={config.top_k} chosen experts to sum to 1, which is another function"
        )
    rope_theta = float(config.rope_theta)
    kind = "llama" if config.is_dense else "mixtral"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _SAME.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "attention_dropout": 0.0,
        "use_cache": True,
        **(_LLAMA_ONLY if config.is_dense else _mixtral_only(config, load_balancing_loss_weight)),
    }


_LLAMA_ONLY = {"attention_bias": False, "mlp_bias": False}


def _mixtral_only(config: ModelConfig, load_balancing_loss_weight: float) -> dict[str, Any]:
    weight = load_balancing_loss_weight if config.balance == "loss" else 0.0
    values: dict[str, Any] = {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "router_aux_loss_coef": weight / config.top_k,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "sliding_window": None,
    }
    if config.d_model % _GROUPED_MM_WIDTH or config.d_ff % _GROUPED_MM_WIDTH:
        values["experts_implementation"] = "eager"  # the default of transformers 5 fails at these widths
    return values


_Unbiased = Annotated[Literal[False], Field(title="false (this model has no biases)")]
_Unscaled = Annotated[Literal["default"], Field(title="default (this model has no scaled rotary positions)")]
_WholeHeads = Annotated[float, Field(ge=1, le=1, title="1 (positions rotate whole heads here)")]
_Unquantized = Annotated[None, Field(title="absent (weights must be float32, bfloat16 or float16)")]
_Usual = Annotated[None, Field(title="absent (weights must be in model.safetensors or in the files of its index)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rope(Section):
    """The rotary positions in config.json, where they are a mapping of their own."""

    rope_type: _Unscaled = "default"
    type: _Unscaled = "default"
    """The name that ``rope_type`` had in old versions of transformers."""
    rope_theta: Positive | None = None
    partial_rotary_factor: _WholeHeads = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Llama(Section):
    """The keys of a Llama's config.json that define its function, with the defaults of transformers."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: Count = 2048
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_parameters: _Rope = _Rope()
    rope_scaling: _Rope = _Rope()
    partial_rotary_factor: _WholeHeads = 1.0
    tie_word_embeddings: Flag = False
    initializer_range: Positive = 0.02
    attention_bias: _Unbiased = False
    mlp_bias: _Unbiased = False
    sliding_window: Count | None = None
    quantization_config: _Unquantized = None
    transformers_weights: _Usual = None

    _rope_theta_assumed: ClassVar[float] = 1e4

    def problems(self) -> Iterator[Problem]:
        """Yield settings that this model does not have."""
        heads, groups = self.num_attention_heads, self.n_kv_heads
        text = f"num_attention_heads must be a multiple of num_key_value_heads={groups}, got {heads}"
        yield from unless(heads % groups == 0, text, "num_attention_heads", "num_key_value_heads")
        text = f"head_dim must be even and above 0, got {self.head_width}"
        yield from unless(self.head_width % 2 == 0 < self.head_width, text, "head_dim", "hidden_size")
        given = self._rope_thetas()
        both = " and ".join(f"{key}={value}" for key, value in given.items())
        text = f"rope_theta must be the same everywhere, got {both}; versions of transformers read different ones"
        yield from unless(len(set(given.values())) <= 1, text, *given)

    def _rope_thetas(self) -> dict[str, float]:
        given = {
            "rope_theta": self.rope_theta,
            "rope_parameters.rope_theta": self.rope_parameters.rope_theta,
            "rope_scaling.rope_theta": self.rope_scaling.rope_theta,
        }
        return {key: value for key, value in given.items() if value is not None}

    @property
    def rope_base(self) -> float:
        """The base of the rotary frequencies, from whichever key has it."""
        return next(iter(self._rope_thetas().values()), self._rope_theta_assumed)

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads; null is one for each query head."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of one head; null divides the model's width among the heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def experts(self) -> tuple[int, int]:
        """Experts per layer, and experts per token."""
        return 1, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mistral(_Llama):
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131_072
    sliding_window: Count | None = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mixtral(_Llama):
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131_072
    rms_norm_eps: Positive = 1e-5
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    _rope_theta_assumed: ClassVar[float] = 1e6

    def problems(self) -> Iterator[Problem]:
        """Yield settings that this model does not have."""
        yield from super().problems()
        n_experts, top_k = self.experts
        is_dense = n_experts == 1
        text = "num_local_experts must be at least 2, got 1: a model with one expert is a Llama"
        yield from unless(not is_dense, text, "num_local_experts")
        text = "num_experts_per_tok must be at least 2, got 1: rescaled to 1, its weight gives the router no gradient"
        yield from unless(is_dense or top_k > 1, text, "num_experts_per_tok")
        text = f"num_experts_per_tok must be at most num_local_experts={n_experts}, got {top_k}"
        yield from unless(is_dense or top_k <= n_experts, text, "num_experts_per_tok", "num_local_experts")

    @property
    def experts(self) -> tuple[int, int]:
        """Experts per layer, and experts per token."""
        return self.num_local_experts, self.num_experts_per_tok


_ARCHITECTURES: dict[str, type[_Llama]] = {
    "MixtralForCausalLM": _Mixtral,
    "MistralForCausalLM": _Mistral,
    "LlamaForCausalLM": _Llama,
}


def from_hugging_face(values: dict[str, Any], max_seq_len: int | None = None) -> ModelConfig:
    """Return the config of the model that a config.json describes.

    Args:
        values: the contents of config.json.
        max_seq_len: the context to use instead of ``max_position_embeddings``.

    Raises:
        InputError: if the architecture is another one; else with one line for each setting that is missing, of the
            wrong type, contradictory or not available in this model.
    """
    keys = _keys_of(values)
    known = keys.from_mapping(_known(keys, values))
    context = max_seq_len or known.max_position_embeddings
    if known.sliding_window is not None and known.sliding_window < context:
        window = known.sliding_window
        raise InputError(
            f"sliding_window must be at least the context of {context} tokens, got {window}, because attention "
            f"here covers the whole context; with --max-seq-len {window} (in Python max_seq_len={window}, in a run "
            f"model.max_seq_len={window}), both compute the same"
        )
    n_experts, top_k = known.experts
    return ModelConfig(
        **{ours: getattr(known, theirs) for theirs, ours in _SAME.items()},
        n_kv_heads=known.n_kv_heads,
        head_dim=known.head_width,
        n_experts=n_experts,
        top_k=top_k,
        max_seq_len=context,
        rope_theta=known.rope_base,
    )


def _known(keys: type[Section], values: Any) -> Any:
    """Keep only the keys of a section, because config.json has many others that do not change the function."""
    if not isinstance(values, dict):
        return values
    inside = {name: section_in(kind) for name, kind in annotations_of(keys).items() if name in values}
    if quoted := [name for name in inside if isinstance(values[name], str) and re.match(r"\s*[-+.\d]", values[name])]:
        raise InputError(f"{quoted[0]} must be a number without quotes, got {shown(values[quoted[0]])}")
    return {name: _known(section, values[name]) if section else values[name] for name, section in inside.items()}


def _keys_of(values: dict[str, Any]) -> type[_Llama]:
    """Return the section for a config.json's architecture."""
    name, model_type = _architecture(values), values.get("model_type")
    if name not in list(_ARCHITECTURES):  # a list, because a stranger's name may be unhashable
        raise InputError(f"architectures must name one of {', '.join(_ARCHITECTURES)}, got {shown(name)}")
    if model_type not in (None, _kind(name)):
        raise InputError(f"model_type must be {_kind(name)} for {name}, got {shown(model_type)}: they disagree")
    return _ARCHITECTURES[name]


def _architecture(values: dict[str, Any]) -> Any:
    """Return the single entry of ``architectures``; without that key, the architecture of ``model_type``."""
    names, model_type = values.get("architectures"), values.get("model_type")
    if names is None:
        return next((name for name in _ARCHITECTURES if _kind(name) == model_type), model_type)
    if not isinstance(names, list) or len(names) != 1:
        raise InputError(f"architectures must be a list of one name, got {shown(names)}")
    return names[0]


def _kind(architecture: str) -> str:
    """Return the ``model_type`` of an architecture."""
    return architecture.removesuffix("ForCausalLM").lower()
