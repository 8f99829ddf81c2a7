"""moe_gpt: the GPT-4 recipe as it was publicly reported, small enough to train on a laptop or one GPU.

To train and to use a model:

    train(config, overrides=(), run_dir=None, ...)   train a model and return the run
    load(path)                                       load a run, a checkpoint or a Hugging Face folder
    save(model, folder)                              write a Hugging Face folder
    read_run(run_dir)                                read the records of a run as pandas tables
    LanguageModel                                    a loaded model: generate, stream, chat, evaluate, route, plot_route
    Callback, EarlyStopping                          methods that a run calls; they may stop the run
    StepPlan                                         the plan of a step, which a schedule of your own returns

To build a model:

    ModelConfig, RunConfig, load_run_config          the settings of a model and of a run
    MoEGPT, ModelOutput                              the decoder, and the result of its forward pass
    MoE, Router, Routing, RouterStats                an expert layer, its router, the router's decision, statistics
    SamplingConfig, generate, load_model             load a saved model, and continue token ids with it
    Engine, Request                                  continue many requests at once

Shapes, everywhere in the package:

    B sequences · T positions in a sequence · N = B·T tokens, flattened · D d_model · H query heads
    G key-value heads · Dh head_dim · F d_ff · E experts · K experts of a token · L layers
    V vocabulary · S positions of keys, cached ones included · R rows of the dispatched buffer

Each public name is imported on first use, so that ``import moe_gpt`` and ``--help`` stay fast.
"""

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any

# A thread that waits spins, against whoever else wants its core. This bound must stand before torch loads; it costs
# nothing on a quiet machine, and beside busy processes training does not collapse (docs/benchmarks.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # libgomp's iterations
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # milliseconds, for LLVM's and Intel's runtime

# MKL then adds a row of a product in one order, however many rows there are: what a served request gets does not depend
# on its company (docs/serving.md). On Intel's processors training takes 0.98 of the time; on others it is not measured.
with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as _file:
    if b"GenuineIntel" in _file.read(200):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel, load
    from moe_gpt.api.records import read_run
    from moe_gpt.api.saving import save
    from moe_gpt.api.training import train
    from moe_gpt.config import ModelConfig, RunConfig
    from moe_gpt.config.yaml import load_run_config
    from moe_gpt.inference.engine import Engine
    from moe_gpt.inference.generate import generate
    from moe_gpt.inference.request import Request
    from moe_gpt.inference.sampling import SamplingConfig
    from moe_gpt.model.losses import RouterStats
    from moe_gpt.model.moe import MoE
    from moe_gpt.model.router import Router, Routing
    from moe_gpt.model.transformer import ModelOutput, MoEGPT
    from moe_gpt.training.callbacks import Callback, EarlyStopping
    from moe_gpt.training.saving.saved_model import load_model
    from moe_gpt.training.schedule import StepPlan

__version__ = "0.1.0"

_NAMES_BY_PLACE = {
    "api.loaded": ("LanguageModel", "load"),
    "api.records": ("read_run",),
    "api.saving": ("save",),
    "api.training": ("train",),
    "config": ("ModelConfig", "RunConfig"),
    "config.yaml": ("load_run_config",),
    "inference.engine": ("Engine",),
    "inference.generate": ("generate",),
    "inference.request": ("Request",),
    "inference.sampling": ("SamplingConfig",),
    "model.losses": ("RouterStats",),
    "model.moe": ("MoE",),
    "model.router": ("Router", "Routing"),
    "model.transformer": ("MoEGPT", "ModelOutput"),
    "training.callbacks": ("Callback", "EarlyStopping"),
    "training.saving.saved_model": ("load_model",),
    "training.schedule": ("StepPlan",),
}
_PLACES = {name: place for place, names in _NAMES_BY_PLACE.items() for name in names}

__all__ = [
    "Callback",
    "EarlyStopping",
    "Engine",
    "LanguageModel",
    "MoE",
    "MoEGPT",
    "ModelConfig",
    "ModelOutput",
    "Request",
    "Router",
    "RouterStats",
    "Routing",
    "RunConfig",
    "SamplingConfig",
    "StepPlan",
    "generate",
    "load",
    "load_model",
    "load_run_config",
    "read_run",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _PLACES:
        raise AttributeError(f"module 'moe_gpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moe_gpt.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"importlib", "TYPE_CHECKING", "Any"})
