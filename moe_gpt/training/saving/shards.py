"""Tensors in one file of each rank: pieces of them, with their places, and whole tensors put together again.

The format is that of ``torch.distributed.checkpoint`` (``HuggingFaceStorageWriter`` with ``save_distributed``):
safetensors with each piece's offsets in the header, so its reader reads these files too. They are written here, because
its writer neither forces files to the disk nor takes several pieces of a tensor from one rank, as matrices have that
ranks share. Such pieces are named ``name#1``, ``name#2``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from moe_gpt.distributed.cut import pieces_of
from moe_gpt.errors import InputError
from moe_gpt.files.durable import FileDigest
from moe_gpt.files.inside import inside
from moe_gpt.files.tensors import TensorReader, TensorSpec, write_tensors
from moe_gpt.training.saving.manifest import files_of

_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"


class Piece(NamedTuple):
    """A part of a whole tensor that one rank saves."""

    name: str
    offsets: tuple[int, ...]
    """Where the piece starts in the whole tensor, along each dimension."""
    tensor: Tensor


def take_pieces(tensors: Mapping[str, tuple[Tensor, Tensor]], copy: bool) -> list[Piece]:
    """Return what this rank saves of tensors, on the CPU.

    Args:
        tensors: by name, ``local_part`` of parameters or things of their shape, and the parameters.
        copy: copy every piece, so that training can go on while it is written.
    """
    return [
        Piece(name, offsets, piece.to("cpu", copy=copy))
        for name, (part, like) in tensors.items()
        for offsets, piece in pieces_of(part.detach(), like)
    ]


def write_pieces(path: Path, pieces: Sequence[Piece]) -> FileDigest:
    """Write a rank's pieces into one file."""
    keyed: dict[str, Piece] = {}
    for piece in pieces:
        number = sum(other.name == piece.name for other in keyed.values())
        keyed[f"{piece.name}#{number}" if number else piece.name] = piece
    specs = [TensorSpec(key, tuple(piece.tensor.shape), piece.tensor.dtype) for key, piece in keyed.items()]
    places = {key: {_OFFSETS: piece.offsets} for key, piece in keyed.items()}
    metadata = {_INFO: json.dumps(places), "DCP_VERSION": "1.0"}
    return write_tensors(path, specs, lambda key: keyed[key].tensor, metadata)


class _Place(NamedTuple):
    """Where a piece is."""

    file: Path
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class ShardReader:
    """Reads whole tensors by name from the pieces in the files of all ranks, each when it is asked for.

    Raises:
        InputError: naming the file that is no such file, and the tensor of which pieces are missing or overlap.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, list[_Place]] = {}
        self._readers = {path: TensorReader([path]) for path in paths}
        for path, reader in self._readers.items():
            offsets = _read_offsets(path)
            for key in reader.names:
                place = _Place(path, key, offsets.get(key, ()), reader.shape(key))
                self._places.setdefault(key.partition("#")[0], []).append(place)
        for name, places in self._places.items():
            _check_complete(name, places)

    @property
    def names(self) -> list[str]:
        """Every tensor there is."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor without reading it."""
        return _whole_shape(self._places[name])

    def dtype(self, name: str) -> str:
        """Return the format's name of a tensor's type, such as BF16."""
        place = self._places[name][0]
        return self._readers[place.file].dtype(place.key)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        places = self._places[name]
        pieces = [self._readers[place.file].read(place.key) for place in places]
        whole = torch.empty(self.shape(name), dtype=pieces[0].dtype)
        for place, piece in zip(places, pieces, strict=True):
            whole[tuple(slice(start, start + n) for start, n in zip(place.offsets, place.shape, strict=True))] = piece
        return whole


def _whole_shape(places: Sequence[_Place]) -> tuple[int, ...]:
    ends = [[start + n for start, n in zip(place.offsets, place.shape, strict=True)] for place in places]
    return tuple(max(along) for along in zip(*ends, strict=True))


def _read_offsets(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        try:
            places = json.loads((file.metadata() or {})[_INFO])
            return {key: tuple(map(int, place[_OFFSETS])) for key, place in places.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} has no places of pieces ({_INFO}): {error}") from None


def _check_complete(name: str, places: Sequence[_Place]) -> None:
    """Raise ``InputError`` where pieces do not fill the whole tensor; each place is filled once."""
    if any(len(place.offsets) != len(place.shape) for place in places):
        raise InputError(f"a piece of {name} in {places[0].file.parent} has no place")
    whole, found = torch.Size(_whole_shape(places)).numel(), sum(torch.Size(place.shape).numel() for place in places)
    if whole != found:
        raise InputError(f"the pieces of {name} in {places[0].file.parent} have {found:,} of {whole:,} numbers")


def open_tensors(path: Path, name: str) -> TensorReader | ShardReader:
    """Open the tensors of a checkpoint that a name of ``manifest`` stands for, whole ones or pieces."""
    files = files_of(path, (name,))
    paths = [inside(path, file) for file in files]
    return TensorReader(paths) if files == [name] else ShardReader(paths)
