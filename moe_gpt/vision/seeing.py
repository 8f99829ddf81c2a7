"""A text model that sees: the decoder, an encoder of pictures, and cross-attention between them as one model.

Without pictures it is the text model, bit for bit. The weights of the decoder never change; those of the encoder and of
cross-attention learn. A checkpoint is an ordinary one with more tensors: ``cross.*``, ``encoder.*`` and
``resampler.*``. An encoder from a folder is not among them: it is read from its folder, whose digest a run records.

A picture takes the place of a line end in the text, and that token and all later ones see it. So a text with pictures
needs no token that the text model does not know, and its vocabulary stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from moe_gpt.config import ModelConfig, Scales, scales_of
from moe_gpt.config.vision import SeeConfig
from moe_gpt.model.router import MakeRouter, Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.vision.cross_attention import CrossLayers, Seen
from moe_gpt.vision.encoders import FolderEncoder, Resampler, SmallEncoder

OWN = ("cross.", "encoder.", "resampler.")
"""Beginnings of the names of what the text model does not have."""


class SeeingModel(MoEGPT):
    """A ``MoEGPT`` with an encoder and cross-attention. ``seeing_class`` gives the class its settings."""

    settings: ClassVar[SeeConfig]

    def __init__(self, config: ModelConfig, make_router: MakeRouter = Router) -> None:
        super().__init__(config, make_router)
        see = self.settings
        self.encoder: SmallEncoder | FolderEncoder = (
            SmallEncoder(see.side, see.width) if see.encoder == "small" else FolderEncoder(see.encoder)
        )
        width = self.encoder.width
        self.resampler = Resampler(width, see.resampled_rows) if see.resampled_rows else nn.Identity()
        self.cross = CrossLayers(self, width, see.every)

    @classmethod
    def from_model(cls, model: MoEGPT) -> SeeingModel:
        """Return a model with copies of a text model's weights, which no optimizer will move, and closed gates."""
        result = cls(model.config, model.make_router)
        result.load_state_dict({**result.state_dict(), **model.state_dict()})
        for name, parameter in result.named_parameters():
            parameter.requires_grad_(name.startswith(OWN))
        return result.to(model.embedding.weight.device)

    def scales_of(self, name: str) -> Scales:
        """Return the factors of a parameter's learning rate; those of what is new do not depend on muP."""
        if name.startswith(OWN):
            return Scales(lr=self.settings.gate_lr_scale if name.endswith("_gate") else 1.0)
        return scales_of(self.config, name)

    def features(self, pictures: UInt8[Tensor, "P 3 size size"]) -> Float[Tensor, "P S Dv"]:
        """Return the rows of features of pictures."""
        return self.resampler(self.encoder(pictures))

    def seen(self, features: Float[Tensor, "P S Dv"], n_pictures: Sequence[int], sees: Int[Tensor, "B T"]) -> Seen:
        """Return what a batch sees.

        Args:
            features: of the pictures of all sequences, one after another.
            n_pictures: how many each sequence has.
            sees: number of the picture that each token sees, from 1; 0 for none.
        """
        counts = torch.tensor(n_pictures, device=features.device)
        numbers = torch.arange(1, max(n_pictures) + 1, device=features.device).expand(len(counts), -1)
        is_there = numbers <= counts[:, None]
        padded = features.new_zeros(*numbers.shape, *features.shape[1:]).masked_scatter(
            is_there[..., None, None], features
        )
        of_row = (numbers * is_there).repeat_interleave(features.shape[1], dim=1)
        return Seen(padded.flatten(1, 2), of_row, sees)

    @torch.no_grad()
    def weights(self, tokens: Int[Tensor, "B T"], seen: Seen) -> Float[Tensor, "B T S"]:
        """Return how much each token looks at each row of features, in the mean over layers and heads."""
        found, layers = list[Tensor](), list[Any](self.cross.layers)
        with contextlib.ExitStack() as stack:
            for layer in layers:
                look = layer.attention.register_forward_pre_hook(
                    lambda module, given: found.append(module.weights(given[0], seen))
                )
                stack.callback(look.remove)
            with self.looking(seen):
                self.hidden_states(tokens)
        return torch.stack(found).mean((0, 2))

    def looking(self, seen: Seen | None) -> AbstractContextManager[None]:
        """Let the model see within the block, whatever of it is called; None is text alone."""
        return self.cross.looking(self, seen)


@functools.cache
def seeing_class(settings: SeeConfig) -> type[SeeingModel]:
    """Return the class of models with these settings.

    A class of its own, so that whoever makes a model of the same kind from config and router alone, as who reads a
    checkpoint does, gets the same one.
    """
    return type("SeeingModel", (SeeingModel,), {"settings": settings})
