"""Folders of Mllama, the text model of Llama 3.2: a dense model that sees, for ``transformers.MllamaForCausalLM``.

Their cross-attention takes features as wide as the residual stream, and heads that together are as wide. Where ours
are not, the exported model is wider by zeros: numbers that it carries along, and heads that nobody reads. A norm over
more numbers divides by a smaller root mean square, so its weight and epsilon are scaled; normalised queries and keys
are scaled beforehand, so that the new epsilon means to them what the old one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_gpt.config import ModelConfig
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.durable import write_file
from moe_gpt.files.tensors import TensorSpec, write_sharded
from moe_gpt.interop import hugging_face
from moe_gpt.interop.mixtral_layout import Slice, tensor_table, to_hugging_face
from moe_gpt.interop.tokenizer_files import Chat, padding_id, token_ids, write_json, write_tokenizer
from moe_gpt.vision.seeing import SeeingModel

_MORE_EMBEDDINGS = 8
"""Rows that Mllama's embedding has beyond the vocabulary, for its own tokens of pictures."""


class Layout(NamedTuple):
    """What decides the tensors of a folder."""

    config: ModelConfig
    features: int
    """Width of the encoder's rows."""
    every: int
    """Cross-attention is before the blocks 0, ``every``, 2 · ``every``, and so on."""

    @property
    def width(self) -> int:
        """The exported ``hidden_size``, at least that of the residual stream, of the heads and of the features."""
        config = self.config
        unit = config.head_dim * config.n_kv_heads
        return -(-max(config.d_model, config.n_heads * config.head_dim, self.features) // unit) * unit

    @property
    def n_heads(self) -> int:
        """The exported ``num_attention_heads``."""
        return self.width // self.config.head_dim

    def places(self) -> list[tuple[bool, int]]:
        """Return the exported layers: whether each is cross-attention, and its number among its kind."""
        found = list[tuple[bool, int]]()
        for block in range(self.config.n_layers):
            found += [(True, block // self.every)] * (block % self.every == 0) + [(False, block)]
        return found


Fit = Callable[[Layout, Tensor], Tensor]


def _pad(x: Tensor, *shape: int) -> Tensor:
    """Append zeros to each dimension."""
    return F.pad(x, [n for old, new in zip(x.shape[::-1], shape[::-1], strict=True) for n in (0, new - old)])


def _shrink(layout: Layout) -> float:
    """Return by what a root mean square is smaller with the zeros."""
    return float((layout.config.d_model / layout.width) ** 0.5)


def _norm(layout: Layout, x: Tensor) -> Tensor:
    return _pad(x, layout.width) * _shrink(layout)


def _in(layout: Layout, x: Tensor) -> Tensor:
    return _pad(x, len(x), layout.width)


def _out(layout: Layout, x: Tensor) -> Tensor:
    return _pad(x, layout.width, x.shape[1])


def _to_heads(layout: Layout, x: Tensor) -> Tensor:
    """New heads stand behind those that share their key-value head."""
    groups = x.unflatten(0, (layout.config.n_kv_heads, -1))
    return _pad(groups, len(groups), layout.width // len(groups), layout.width).flatten(0, 1)


def _from_heads(layout: Layout, x: Tensor) -> Tensor:
    return _to_heads(layout, x.t()).t().contiguous()


def _normed(fit: Fit) -> Fit:
    return lambda layout, x: fit(layout, x) * _shrink(layout)


def _embedding(layout: Layout, x: Tensor) -> Tensor:
    return _pad(x, len(x) + _MORE_EMBEDDINGS, layout.width)


def _same(_: Layout, x: Tensor) -> Tensor:
    return x


_TEXT: dict[str, Fit] = {
    "embed_tokens": _embedding,
    "norm": _norm,
    "lm_head": _in,
    "input_layernorm": _norm,
    "post_attention_layernorm": _norm,
    "q_proj": _to_heads,
    "k_proj": _in,
    "v_proj": _in,
    "o_proj": _from_heads,
    "gate_proj": _in,
    "up_proj": _in,
    "down_proj": _out,
}
"""What becomes of a tensor of the text model, by the last part of its name in a Llama."""


def _cross_layer(config: ModelConfig, number: int) -> Iterator[tuple[str, Slice, Fit]]:
    """Yield the tensors of a layer of cross-attention by their names in Mllama."""
    ours, n = f"cross.layers.{number}.", config.n_kv_heads * config.head_dim
    yield "input_layernorm.weight", Slice(ours + "attention_norm.weight"), _norm
    yield "post_attention_layernorm.weight", Slice(ours + "feed_forward_norm.weight"), _norm
    yield "cross_attn.q_proj.weight", Slice(ours + "attention.q.weight"), _normed(_to_heads)
    yield "cross_attn.k_proj.weight", Slice(ours + "attention.kv.weight", rows=(0, n)), _normed(_in)
    yield "cross_attn.v_proj.weight", Slice(ours + "attention.kv.weight", rows=(n, 2 * n)), _in
    yield "cross_attn.o_proj.weight", Slice(ours + "attention.out.weight"), _from_heads
    yield "cross_attn.q_norm.weight", Slice(ours + "attention.q_norm.weight"), _same
    yield "cross_attn.k_norm.weight", Slice(ours + "attention.k_norm.weight"), _same
    yield "cross_attn_attn_gate", Slice(ours + "attention_gate"), _same
    yield "cross_attn_mlp_gate", Slice(ours + "feed_forward_gate"), _same
    for name, rows in (("gate_proj", (0, config.d_ff)), ("up_proj", (config.d_ff, 2 * config.d_ff))):
        yield f"mlp.{name}.weight", Slice(ours + "feed_forward.gate_up.weight", rows=rows), _in
    yield "mlp.down_proj.weight", Slice(ours + "feed_forward.down.weight"), _out


def tensors_of(layout: Layout) -> dict[str, tuple[Slice, Fit]]:
    """Map each tensor of Mllama to the slice of ours that it is, and to what is done to it."""
    text = tensor_table(layout.config)
    text.setdefault("lm_head.weight", Slice("embedding.weight"))
    where = {block: place for place, (is_cross, block) in enumerate(layout.places()) if not is_cross}
    table: dict[str, tuple[Slice, Fit]] = {}
    for name, part in text.items():
        if name.startswith("model.layers."):
            _, _, block, rest = name.split(".", 3)
            name = f"model.layers.{where[int(block)]}.{rest}"
        table[name] = part, _TEXT[name.removesuffix(".weight").rpartition(".")[2]]
    for place, (is_cross, number) in enumerate(layout.places()):
        if is_cross:
            cross = _cross_layer(layout.config, number)
            table |= {f"model.layers.{place}.{name}": (part, fit) for name, part, fit in cross}
    return table


def _settings(layout: Layout, token_ids: Mapping[str, int | None], pad: int, dtype: str) -> dict[str, Any]:
    """Return the contents of config.json. There is no vision model in the folder, so the one described is empty."""
    config, places = layout.config, layout.places()
    llama = to_hugging_face(config, 0.0)
    same = ("vocab_size", "intermediate_size", "num_key_value_heads", "hidden_act", "max_position_embeddings")
    text = {
        **{key: llama[key] for key in (*same, "initializer_range", "rope_theta", "rope_parameters")},
        "model_type": "mllama_text_model",
        "rope_scaling": llama["rope_parameters"],  # the name in transformers 4
        "hidden_size": layout.width,
        "num_attention_heads": layout.n_heads,
        "num_hidden_layers": len(places),
        "cross_attention_layers": [place for place, (is_cross, _) in enumerate(places) if is_cross],
        "rms_norm_eps": config.norm_eps * _shrink(layout) ** 2,
        "tie_word_embeddings": False,
        "pad_token_id": pad,
        **{key: number for key, number in token_ids.items() if number is not None},
    }
    nothing = {"hidden_size": 16, "attention_heads": 1, "num_hidden_layers": 0, "num_global_layers": 0}
    nothing |= {"intermediate_size": 16, "vision_output_dim": layout.features}
    return {
        "architectures": ["MllamaForCausalLM"],
        "model_type": "mllama",
        "torch_dtype": dtype,
        "dtype": dtype,
        "text_config": text,
        "vision_config": {"model_type": "mllama_vision_model", "intermediate_layers_indices": [], **nothing},
        "image_token_index": config.vocab_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": config.max_seq_len,
        **token_ids,
    }


def refuse_mixture(config: ModelConfig, name: str) -> None:
    """Raise ``InputError`` for a model with experts."""
    if not config.is_dense:
        raise InputError(
            f"{name} is a mixture that sees, and cannot be exported: Mllama is dense, and transformers has no model "
            "with experts and cross-attention; it is saved in the format of moe_gpt, which moe_gpt.load reads"
        )


def notes(layout: Layout) -> Iterator[str]:
    """Yield what differs between the folder and the model."""
    yield (
        "the encoder is not in the folder: transformers takes its features, which moe_gpt computes, as "
        "cross_attention_states, always with a cross_attention_mask (README.md of the folder shows how)"
    )
    yield (
        "tokens before the first picture, which see nothing, are changed by Mllama's layers and not by ours: begin "
        "with the picture; without cross_attention_states, text alone is the same"
    )
    if layout.width > layout.config.d_model:
        yield (
            f"hidden_size is {layout.width}, not {layout.config.d_model}: Mllama has one width for features, heads and "
            "residual stream; what is beyond is zeros"
        )


def save(
    model: SeeingModel, folder: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a folder from which ``transformers.AutoModelForCausalLM.from_pretrained`` loads a dense model that sees.

    Raises:
        InputError: for a mixture or quantised weights; for a folder that is not empty or cannot be written.
    """
    hugging_face.require_plain_weights(model)
    layout = Layout(model.config, model.encoder.width, model.cross.every)
    own = model.state_dict()
    export(layout, own.__getitem__, lambda name: tuple(own[name].shape), folder, tokenizer, dtype, name="the model")


def export(
    layout: Layout,
    read: Callable[[str], Tensor],
    shape_of: Callable[[str], tuple[int, ...]],
    folder: str | Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    model_card: str | None = None,
    chat: Chat | None = None,
    name: str = "the run",
) -> None:
    """Write a folder as ``save`` does, but from weights that are read one tensor at a time.

    Args:
        layout: of the model.
        read: returns one of the model's tensors by our name.
        shape_of: returns its shape.
        folder: appears complete or not at all.
        tokenizer: as in ``hugging_face.export``, as are the others.
        name: of the model, in the error for a mixture.
    """
    refuse_mixture(layout.config, name)
    table = tensors_of(layout)

    def fitted(name: str, tensor: Tensor) -> Tensor:
        part, fit = table[name]
        return fit(layout, part.of(tensor))

    def read_fitted(name: str) -> Tensor:
        return hugging_face.finite(fitted(name, read(table[name][0].name)), table[name][0].name)

    specs = [
        TensorSpec(name, tuple(fitted(name, torch.empty(shape_of(part.name), device="meta")).shape), dtype)
        for name, (part, _) in table.items()
    ]
    ids = token_ids(layout.config, tokenizer, keep_template=False)
    pad = padding_id(tokenizer) if tokenizer else 0
    settings = _settings(layout, ids, pad, str(dtype).removeprefix("torch."))
    with hugging_face.new_folder(folder) as temporary:
        write_sharded(temporary, specs, read_fitted)
        write_json(temporary / "config.json", settings)
        if tokenizer:
            write_tokenizer(temporary, tokenizer, settings, False, chat)
        if model_card:
            write_file(temporary / "README.md", [model_card.encode("utf-8")])
