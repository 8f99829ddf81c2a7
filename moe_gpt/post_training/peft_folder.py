"""Adapters as a folder of PEFT (Hugging Face), in the names of transformers' Mixtral or Llama.

PEFT 0.17 and newer load it on top of the exported base model. There is no other format for adapters here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_gpt.errors import InputError, shown
from moe_gpt.files.durable import complete_folder, write_file
from moe_gpt.files.inside import inside, read_json
from moe_gpt.files.tensors import TensorReader, TensorSpec, write_tensors
from moe_gpt.interop.mixtral_layout import Slice, tensor_table
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.adapters import LowRank, adapt, adapters_of, freeze

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Settings under which an adapter is B A, and nothing else."""
Factors = tuple[Tensor, Tensor]
"""PEFT's A (E·r, n_in), expert by expert, and B (n_out, r·E), rank by rank; E is 1 for a matrix of its own."""


def save_adapters(model: MoEGPT, folder: str | Path, base_model: str | None = None) -> None:
    """Write the adapters alone.

    A balancing bias (``balance: bias``), which training moves too, is not saved with them.

    Args:
        model: with adapters.
        folder: is made; must not hold anything.
        base_model: where PEFT finds the base model.

    Raises:
        InputError: without adapters, for one of a router, which PEFT does not know, and for unequal ranks or scales.
        OSError: where the folder cannot be written.
    """
    adapters = adapters_of(model)
    kinds = {(adapter.a.shape[-2], adapter.scale) for adapter in adapters.values()}
    if len(kinds) != 1 or any("router" in name for name in adapters):
        raise InputError(
            "adapters must be of one rank and scale and of no router to be saved, got "
            f"{shown(sorted(adapters))}; merge them and save the model"
        )
    ((rank, scale),) = kinds
    tensors, values = _tensors(model, adapters), _settings(model, adapters, rank, scale, base_model)
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with complete_folder(Path(folder)) as temporary:
        write_tensors(temporary / WEIGHTS, specs, tensors.__getitem__)
        write_file(temporary / CONFIG, [json.dumps(values, indent=2).encode() + b"\n"])


def _tensors(model: MoEGPT, adapters: dict[str, LowRank]) -> dict[str, Tensor]:
    """Return PEFT's tensors by name."""
    tensors = {}
    for theirs, part in tensor_table(model.config, "fused").items():
        if adapter := adapters.get(part.name):
            key = _key(theirs, any(name.endswith("experts.down") for name in adapters))
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = _factors(adapter, part)
    return tensors


def _settings(
    model: MoEGPT, adapters: dict[str, LowRank], rank: int, scale: float, base_model: str | None
) -> dict[str, Any]:
    """Return the contents of adapter_config.json; it lists modules and parameters by the ends of their names."""
    names = [theirs.split(".") for theirs, part in tensor_table(model.config, "fused").items() if part.name in adapters]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "inference_mode": True,
        **_PLAIN,
        "target_modules": sorted({name[-2] for name in names if name[-1] == "weight"}),
        "target_parameters": sorted({".".join(name[-3:]) for name in names if name[-1] != "weight"}),
    }


def _key(theirs: str, adapts_down: bool) -> str:
    """Return the stem of PEFT's names for a tensor of transformers.

    The experts' two tensors are parameters of one module, which PEFT wraps once for each; the first is inside.
    """
    stem = "base_model.model." + theirs.removesuffix(".weight")
    experts, _, tensor = stem.rpartition(".")
    if tensor == "gate_up_proj" and adapts_down:
        return f"{experts}.base_layer"
    return experts if experts.endswith(".experts") else stem


def _factors(adapter: LowRank, part: Slice) -> Factors:
    a, b = adapter.a.detach(), adapter.b.detach()
    return (a, part.of(b)) if b.dim() == 2 else (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def load_adapters(model: MoEGPT, folder: str | Path) -> list[str]:
    """Freeze the model and give it the adapters of a folder; return the names of the adapted tensors.

    Where PEFT has different matrices A for queries, keys and values, the adapter here has their ranks together.

    Raises:
        InputError: for a folder that is not of LoRA in its plain form, has tensors that are left over or of another
            shape, or adapts layers that share attention differently.
    """
    folder = Path(folder)
    values = read_json(folder, CONFIG)
    wrong = {key: values[key] for key, plain in _PLAIN.items() if values.get(key) not in (plain, None)}
    if values.get("peft_type") != "LORA" or wrong or not {"r", "lora_alpha"} <= values.keys():
        raise InputError(
            f"{folder / CONFIG} must be of plain LoRA with r and lora_alpha, got peft_type "
            f"{shown(values.get('peft_type'))} and {shown(wrong)}; merge it with merge_and_unload() of peft"
        )
    adapts_down = any("down_proj" in name for name in values.get("target_parameters") or [])
    found = _read(model, TensorReader([inside(folder, WEIGHTS)]), adapts_down, f"{folder / WEIGHTS}")
    freeze(model)
    for name, parts in found.items():
        adapt(model, name, _joined(model.get_parameter(name), parts, values["lora_alpha"] / values["r"]))
    return list(found)


def _read(model: MoEGPT, reader: TensorReader, adapts_down: bool, origin: str) -> dict[str, dict[Slice, Factors]]:
    """Return PEFT's factors of each part of our tensors."""
    found, left_over = dict[str, dict[Slice, Factors]](), set(reader.names)
    for theirs, part in tensor_table(model.config, "fused").items():
        names = [f"{_key(theirs, adapts_down)}.lora_{letter}.weight" for letter in "AB"]
        if not left_over.issuperset(names):
            continue
        left_over -= set(names)
        a, b = map(reader.read, names)
        n_out, n_in = part.of(model.get_parameter(part.name)).shape[-2:]
        if (b.shape[0], a.shape[1], a.shape[0]) != (n_out, n_in, b.shape[1]):
            raise InputError(f"{origin}: {names} must fit a matrix of {n_out} rows and {n_in} columns")
        known = found.setdefault(part.name, {}).setdefault(part, (a, b))
        if not all(map(torch.equal, known, (a, b))):
            raise InputError(f"{origin}: layers that share attention must have equal adapters; {theirs} differs")
    if left_over:
        raise InputError(f"{origin} has tensors that fit nothing in this model: {shown(sorted(left_over))}")
    return found


def _joined(weight: Tensor, parts: dict[Slice, Factors], scale: float) -> LowRank:
    """Return one adapter for the parts of a tensor, which have ranks of their own unless they share A."""
    *stack, n_out, n_in = weight.shape
    if stack:
        ((a, b),) = parts.values()
        return LowRank(
            a.view(*stack, -1, n_in).to(weight), b.view(n_out, -1, *stack).permute(2, 0, 1).to(weight), scale
        )
    all_a = [a for a, _ in parts.values()]
    shares = all(a.equal(all_a[0]) for a in all_a)
    a = all_a[0] if shares else torch.cat(all_a)
    b, first = a.new_zeros(n_out, len(a)), 0
    for part, (_, their_b) in parts.items():
        part.of(b)[:, first : first + their_b.shape[1]] = their_b
        first += 0 if shares else their_b.shape[1]
    return LowRank(a.to(weight), b.to(weight), scale)
