"""moe_gpt: the GPT-4 recipe as it was publicly reported, small enough to train on a laptop or one GPU.

Shapes, everywhere in the package:

    B sequences · T positions in a sequence · N = B·T tokens, flattened · D d_model · H query heads
    G key-value heads · Dh head_dim · F d_ff · E experts · K top_k · L layers
    V vocabulary · S positions of keys, cached ones included · R rows of the dispatched buffer

The public names load on first use, so that ``import moe_gpt`` and ``--help`` stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_gpt.config import ModelConfig, RunConfig
    from moe_gpt.config.yaml import load_run_config
    from moe_gpt.inference.generate import SamplingConfig, generate
    from moe_gpt.model.losses import RouterStats
    from moe_gpt.model.moe import MoE
    from moe_gpt.model.router import Router, Routing
    from moe_gpt.model.transformer import ModelOutput, MoEGPT
    from moe_gpt.training.saving.saved_model import load_model

__version__ = "0.1.0"

__all__ = [
    "MoE",
    "MoEGPT",
    "ModelConfig",
    "ModelOutput",
    "Router",
    "RouterStats",
    "Routing",
    "RunConfig",
    "SamplingConfig",
    "generate",
    "load_model",
    "load_run_config",
]


def _home_of(name: str) -> str:
    match name:
        case "ModelConfig" | "RunConfig":
            return "moe_gpt.config"
        case "load_run_config":
            return "moe_gpt.config.yaml"
        case "MoEGPT" | "ModelOutput":
            return "moe_gpt.model.transformer"
        case "RouterStats":
            return "moe_gpt.model.losses"
        case "MoE":
            return "moe_gpt.model.moe"
        case "Router" | "Routing":
            return "moe_gpt.model.router"
        case "SamplingConfig" | "generate":
            return "moe_gpt.inference.generate"
        case "load_model":
            return "moe_gpt.training.saving.saved_model"
    raise AttributeError(f"module 'moe_gpt' has no attribute {name!r}")


def __getattr__(name: str) -> Any:  # PEP 562
    return getattr(importlib.import_module(_home_of(name)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
