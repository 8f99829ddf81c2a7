"""The stage that shows pictures to a text model, and its finished models."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_gpt.errors import InputError
from moe_gpt.files.transformers_folder import check_is_model, digest_of_folder
from moe_gpt.model.router import MakeRouter
from moe_gpt.training.saving.checkpoint import load_weights, read_state
from moe_gpt.training.saving.own_code import router_for
from moe_gpt.training.saving.saved_model import LoadedRun, SavedModel, open_checkpoint
from moe_gpt.vision.seeing import SeeingModel, seeing_class

ENCODER = "encoder"
"""Name of the digest of an encoder's folder among those of a run's data."""


def load_seeing_model(
    run_or_checkpoint: str | Path, device: str | torch.device = "cpu", make_router: MakeRouter | None = None
) -> LoadedRun:
    """Return the model of a run with a section see, in evaluation mode; ``.model`` is a ``SeeingModel``.

    Args:
        run_or_checkpoint: its run folder, or one of its checkpoints.
        device: where the model is to be.
        make_router: the router that the text model was trained with, if it is a user's.

    Raises:
        FileNotFoundError: if there is no complete checkpoint.
        InputError: if it is damaged, of a model that sees nothing, of another router, or if its encoder's folder is
            not there or has other files.
    """
    return load_seeing(open_checkpoint(run_or_checkpoint), device, make_router)


def load_seeing(saved: SavedModel, device: str | torch.device, make_router: MakeRouter | None) -> LoadedRun:
    """Return what ``load_seeing_model`` returns of a checkpoint that is open; the errors are the same."""
    see, config = saved.config.see, saved.config.model
    if see is None:
        raise InputError(f"checkpoint {saved.path} must be of a model that sees (a config with see), got one of text")
    found, wanted = digest_of_encoder(see.encoder), read_state(saved.path)["data_fingerprint"].get(ENCODER, "")
    if found != wanted:
        raise InputError(
            f"checkpoint {saved.path} was trained with another vision model than {see.encoder} has now: its files "
            f"have the digest {found[:8]}, not {wanted[:8]}; put the old files back"
        )
    kind = seeing_class(see)
    model: SeeingModel = kind(config, router_for(saved.router, make_router, str(saved.path)))
    load_weights(model, saved.path, kind)
    return LoadedRun(
        model.to(device).eval(), saved.tokenizer, saved.config, saved.step, saved.path, saved.trained_length
    )


def digest_of_encoder(encoder: str) -> str:
    """Return a digest of the config and weights in the folder of an encoder; empty for the small one."""
    if encoder == "small":
        return ""
    check_is_model(Path(encoder), "see.encoder: ")
    return digest_of_folder(Path(encoder))
