"""Maximal update parametrisation (muP): how initial weights and learning rates depend on width and depth.

What is tuned on a narrow model then holds for a wide one. This is the form of table 3 of Tensor Programs V (arXiv
2203.03466), which changes initial values and learning rates alone: the model computes what it did, and an export is a
plain Mixtral. Experts are hidden matrices, and the router is a readout (arXiv 2508.09752). Depth is that of CompleteP
(arXiv 2505.01618, alpha = 1), folded into the two projections into the residual stream.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, NamedTuple

from moe_gpt.config.section import Count, Section

if TYPE_CHECKING:
    from moe_gpt.config.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MupBase(Section):
    """The shape for which the learning rate was tuned. Settings that are not here must be those of that shape."""

    d_model: Count
    """Width of its residual stream; n_heads x head_dim must stay in the same ratio to it."""
    d_ff: Count
    """Hidden width of its experts."""
    n_layers: Count
    """Its blocks."""


class Scales(NamedTuple):
    """What a parameter's initial standard deviation, learning rate and Adam's eps are multiplied by."""

    std: float = 1.0
    lr: float = 1.0
    eps: float = 1.0


def scales_of(model: ModelConfig, name: str) -> Scales:
    """Return the factors of a parameter by its name; all are 1 where the config has no ``mup_base``.

    ``std`` is relative to ``init_std``, and of the projections into the residual to init_std / sqrt(2 n_layers).
    """
    base = model.mup_base
    if base is None:
        return Scales()
    width, hidden, depth = model.d_model / base.d_model, model.d_ff / base.d_ff, model.n_layers / base.n_layers
    of_kind = {
        r"embedding\.|norm\.": Scales(eps=1 / width),
        r"attention\.qkv|gate_up": Scales(width**-0.5, 1 / width, 1 / width / depth),
        r"attention\.out": _into_residual(width, width, depth),
        r"down": _into_residual(hidden, width, depth),
        r"router\.|output\.": Scales(1 / width, 1 / width, 1 / width),
    }
    return next((scales for pattern, scales in of_kind.items() if re.search(pattern, name)), Scales())


def _into_residual(fan_in: float, width: float, depth: float) -> Scales:
    return Scales((fan_in * depth) ** -0.5, 1 / (fan_in * depth), 1 / (width * depth))
