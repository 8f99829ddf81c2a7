"""Pictures beside a request: encoded before it, and read through keys and values that are computed once.

The passes of an engine mix tokens of many requests. Each token reads the last picture at or before it in its own
request, by products whose bits do not depend on the tokens beside it (``ops.ragged``). Tokens that see no picture, and
all tokens of requests without pictures, do not enter the layers, so their numbers keep their bits.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from moe_gpt import ops
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.vision.cross_attention import GatedCrossBlock
from moe_gpt.vision.seeing import SeeingModel


class _Span(Protocol):
    """As ``inference.request.Span``: new tokens of a request in a pass."""

    @property
    def kept(self) -> object: ...
    @property
    def start(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...


class _Part(NamedTuple):
    """Tokens of a pass that follow each other and see one picture."""

    kept: KeptPictures
    picture: int
    start: int
    n_tokens: int


class ShownPictures:
    """The pictures of a request. Requests may share one, as choices of an answer do.

    Args:
        features: what the model's encoder made of each picture.
        places: of the prompt's tokens that stand for them, ascending.
        digest: of the pictures.
    """

    def __init__(self, features: Float[Tensor, "P S Dv"], places: Sequence[int], digest: str) -> None:
        self.features, self.places, self.digest = features, list(places), f"{digest} at {list(places)}"
        self._kept: KeptPictures | None = None

    def check(self, model: MoEGPT, prompt: Sequence[int]) -> None:
        """Raise ``InputError`` for a model that cannot see them, and places that are not in the prompt."""
        if not isinstance(model, SeeingModel):
            raise InputError("this model sees no pictures: it was not trained with moe-gpt finetune and a section see")
        n_pictures, width = self.features.shape[0], self.features.shape[-1]
        if width != model.encoder.width:
            raise InputError(f"the features of pictures must be {model.encoder.width} wide, got {width}")
        is_ordered = self.places == sorted(set(self.places) & set(range(len(prompt))))
        if not is_ordered or not 0 < len(self.places) == n_pictures:
            raise InputError(
                f"{n_pictures} pictures must stand at as many tokens of a prompt of {len(prompt)}, in order, "
                f"got the places {self.places}"
            )

    def keep(self, model: MoEGPT) -> KeptPictures:
        """Return keys and values for each layer of cross-attention, computed once."""
        if self._kept is None:
            self._kept = KeptPictures(cast(SeeingModel, model), self.features, self.places)
        return self._kept


class KeptPictures:
    """Keys and values of a request's pictures for each layer of cross-attention.

    Args:
        model: computes them.
        features: of the pictures.
        places: as of ``ShownPictures``.
    """

    def __init__(self, model: SeeingModel, features: Float[Tensor, "P S Dv"], places: list[int]) -> None:
        self.places, self.n_rows = places, features.shape[1]
        missing = -self.n_rows % ops.KEY_BLOCK
        self.layers: list[tuple[Tensor, ...]] = []
        for layer in _layers(model):
            both = layer.attention.keys_and_values(features)  # each (P, G, S, Dh)
            self.layers.append(tuple(F.pad(each, (0, 0, 0, missing)) for each in both))
        self.hidden = (torch.arange(self.n_rows + missing, device=features.device) >= self.n_rows)[None, None]

    @contextlib.contextmanager
    def read_by(self, model: MoEGPT, spans: Sequence[_Span]) -> Iterator[None]:
        """Let tokens read their pictures in the passes of this thread within the block."""
        seeing = cast(SeeingModel, model)
        parts = [part for span in spans for part in cast(KeptPictures, span.kept)._parts(span)]
        layers = zip(model.blocks[:: seeing.cross.every], _layers(seeing), strict=True) if parts else ()
        places = [part.start + index for part in parts for index in range(part.n_tokens)]
        which, thread = torch.tensor(places, device=self.hidden.device), threading.get_ident()
        with contextlib.ExitStack() as stack:
            for number, (block, layer) in enumerate(layers):

                def look(
                    _: nn.Module, arguments: tuple[Tensor, ...], number: int = number, layer: GatedCrossBlock = layer
                ) -> tuple[Tensor, ...] | None:
                    if threading.get_ident() != thread:  # somebody else uses the same model
                        return None
                    x = arguments[0]
                    new = layer.after(x[:, which], lambda queries: _attend(queries, parts, number))
                    return (x.index_copy(1, which, new.to(x.dtype)), *arguments[1:])

                stack.callback(block.register_forward_pre_hook(look).remove)
            yield

    def _parts(self, span: _Span) -> Iterator[_Part]:
        """Yield the tokens that see a picture, one picture after another."""
        end = span.position + span.n_tokens
        first = bisect.bisect_right(self.places, span.position) - 1
        for picture in range(max(first, 0), len(self.places)):
            begin = max(self.places[picture], span.position)
            stop = min([end, *self.places[picture + 1 : picture + 2]])
            if begin < stop:
                yield _Part(self, picture, span.start + begin - span.position, stop - begin)


def _layers(model: SeeingModel) -> Iterator[GatedCrossBlock]:
    return (cast(GatedCrossBlock, layer) for layer in model.cross.layers)


def _attend(queries: Float[Tensor, "1 H N Dh"], parts: Sequence[_Part], layer: int) -> Float[Tensor, "1 H N Dh"]:
    """Return what the tokens of all parts, one after another, take from their pictures.

    Parts that are equally long attend together, by keys that are laid side by side for it.
    """
    answers, start = [], 0
    for (n_tokens, _), members in itertools.groupby(parts, lambda part: (part.n_tokens, part.kept.n_rows)):
        alike = list(members)
        n, end = len(alike), start + n_tokens * len(alike)
        pairs = [[each[part.picture] for each in part.kept.layers[layer]] for part in alike]
        keys, values = (torch.stack(each) for each in zip(*pairs, strict=True))
        hidden = alike[0].kept.hidden.expand(n, n_tokens, -1)
        group = ops.RowGroup(slice(0, n * n_tokens), slice(0, n), n_tokens, hidden)
        visible = ops.Visible(rows=ops.RowPlan([group], torch.empty(1, 0, dtype=torch.long)))
        answers.append(ops.attend(queries[:, :, start:end], keys, values, visible))
        start = end
    return torch.cat(answers, dim=2)


@torch.inference_mode()
def encode(model: SeeingModel, pictures: Sequence[UInt8[Tensor, "3 size size"]]) -> Float[Tensor, "P S Dv"]:
    """Return the features of pictures, each encoded alone, so that its bits do not depend on the others.

    On a CPU they do not depend on an engine in another thread either, which changes who makes products.
    """
    device = model.embedding.weight.device
    with ops.as_if_alone() if device.type == "cpu" else contextlib.nullcontext():
        return torch.cat([model.features(picture[None].to(device)) for picture in pictures])
