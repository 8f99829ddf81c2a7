"""The coordinate check of muP: do activations keep their size when the model gets wider?

Models of several widths take a few steps. The root mean square of each layer's outputs is then a power of the width,
and its exponent is the slope here: about 0 with muP, and up to 3 without it, because standard learning rates are too
large for wide models (Tensor Programs V, arXiv 2203.03466, appendix D.1). Widths differ in d_model, and heads and d_ff
go with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from moe_gpt.config import ModelConfig, MupBase, OptimizerConfig
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.studies.plan import Study
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.setup import fill_in
from moe_gpt.training.stage import PRETRAINING, Start, Stream
from moe_gpt.training.step import update_weights

KINDS = ("standard", "mup")
ReadTokens = Callable[[int, int], Tensor]
"""Takes a seed and a step; returns tokens (B, T + 1), of which all but the last are inputs."""
Slopes = dict[str, dict[str, float]]
_STEP_TOKENS = 512


def coordinates(study: Study, say: Callable[[str], None] = print) -> Slopes:
    """Return the slopes that a study asks for.

    Raises:
        InputError: where the study has no section ``coordinates``, and those of ``coordinate_slopes``.
    """
    asked = study.config.coordinates
    if not asked:
        raise InputError("coordinates is required here: coordinates: {widths: [32, 64, 128]}")
    config = next(run.config for run in study.runs if run.arm == (asked.of_arm or run.arm))
    material = PRETRAINING.prepare(config, Start(), say)
    config, _, shares = fill_in(config, material.data, None)
    stage, stream = config.schedule.stages[0], cast(Stream, material.stream(config, shares))

    def read(seed: int, step: int) -> Tensor:
        n_tokens = stage.seq_len * max(1, _STEP_TOKENS // stage.seq_len)
        batch = stream.batch((seed * (asked.steps + 1) + step) * n_tokens, stage.seq_len, n_tokens)
        return torch.from_numpy(np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1))

    return coordinate_slopes(config.model, config.optimizer, asked.widths, asked.seeds, asked.steps, read)


def widened(model: ModelConfig, width: int) -> ModelConfig:
    """Return a model of another width: d_model, heads and d_ff in the same ratio.

    Raises:
        InputError: where they would not be whole numbers.
    """
    sizes = {name: getattr(model, name) * width for name in ("n_heads", "d_ff")}
    broken = [name for name, product in sizes.items() if product % model.d_model]
    if broken:
        raise InputError(
            f"coordinates.widths: at width {width}, {' and '.join(broken)} would be no whole number; widths must keep "
            f"the ratios of d_model={model.d_model}, n_heads={model.n_heads} and d_ff={model.d_ff}"
        )
    heads, d_ff = (product // model.d_model for product in sizes.values())
    return dataclasses.replace(model, d_model=width, n_heads=heads, d_ff=d_ff)


def coordinate_slopes(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    widths: Sequence[int],
    seeds: Sequence[int],
    n_steps: int,
    read: ReadTokens,
) -> Slopes:
    """Return the slope of ln RMS over ln width by kind of parametrisation and name of the activation, mean over seeds.

    Args:
        model: a width for which the learning rate holds; with muP, the others start from it.
        optimizer: AdamW, with a constant learning rate.
        widths: at least two.
        seeds: of the initial weights and the tokens.
        n_steps: before the activations are measured.
        read: gives the tokens; their ids are below ``vocab_size``.

    Raises:
        InputError: for fewer than two widths, and those that do not keep the shape's ratios.
    """
    if len(set(widths)) < 2:
        raise InputError(f"coordinates.widths must be at least two different ones, got {list(widths)}")
    base = MupBase(d_model=model.d_model, d_ff=model.d_ff, n_layers=model.n_layers)
    bases = {"standard": None, "mup": base}
    slopes: Slopes = {}
    for kind in KINDS:
        sizes = []
        for width in widths:
            config = dataclasses.replace(widened(model, width), mup_base=bases[kind])
            sizes.append(_mean([_sizes(config, optimizer, seed, n_steps, read) for seed in seeds]))
        slopes[kind] = _slopes(widths, pd.DataFrame(sizes))
    return slopes


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the geometric means."""
    return np.exp(np.log(pd.DataFrame(found)).mean()).to_dict()


def _slopes(widths: Sequence[int], sizes: pd.DataFrame) -> dict[str, float]:
    slopes = np.polyfit(np.log(widths), np.log(sizes.to_numpy()), 1)[0]
    return dict(zip(sizes.columns, slopes.tolist(), strict=True))


def _sizes(
    config: ModelConfig, optimizer: OptimizerConfig, seed: int, n_steps: int, read: ReadTokens
) -> dict[str, float]:
    """Return the root mean square of each activation after the steps, on the tokens of the next one."""
    torch.manual_seed(seed)
    model = MoEGPT(config)
    state = build_optimizer(model, optimizer)
    for step in range(n_steps):
        tokens = read(seed, step)
        loss, stats = model.cross_entropy(tokens[:, :-1], tokens[:, 1:])
        mean = loss.total / loss.n_valid
        balancing = stats.load_balancing_loss.mean() if stats else 0.0
        (mean + 0.01 * balancing).backward()
        update_weights(model, state, optimizer.lr, optimizer.max_grad_norm, mean)
    return dict(_measured(model.eval(), read(seed, n_steps)[:, :-1]))


@torch.no_grad()
def _measured(model: MoEGPT, tokens: Tensor) -> Iterator[tuple[str, float]]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return a hook; a mixture returns its routing too."""
        return lambda module, _, output: outputs.update({name: output if isinstance(output, Tensor) else output[0]})

    blocks: Any = model.blocks
    watched = [
        module.register_forward_hook(keep(f"{name} {number}"))
        for number, block in enumerate(blocks)
        for name, module in (("attention", block.attention), ("experts", block.feed_forward))
    ]
    hidden, routings = model.hidden_states(tokens)
    for hook in watched:
        hook.remove()
    routers = {f"router logits {number}": routing.router_logits for number, routing in enumerate(routings)}
    for name, output in {**outputs, **routers, "logits": model.output(hidden)}.items():
        yield name, float(output.float().square().mean().sqrt())
