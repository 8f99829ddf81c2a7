"""Sharded safetensors, one tensor in memory at a time.

The format (https://huggingface.co/docs/safetensors): the length of a JSON header in 8 bytes, the header with each
tensor's type, shape and place, then the data. Several files have an index beside them that says where each tensor
is. Reading is the library's; its writer wants all tensors of a file in memory at once, so writing is done here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_gpt.errors import InputError, shown
from moe_gpt.files.durable import FileDigest, write_file
from moe_gpt.files.inside import inside, read_json
from moe_gpt.files.mistaken import cut_off, disguise, odd_name, other_weights, unfinished_download

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}


_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class TensorReader:
    """Reads tensors by name from one or more safetensors files, each when it is asked for.

    Raises:
        InputError: naming the file that is missing, cut off or not safetensors, and a name that is there twice.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._open = {}
        for path in paths:
            try:
                with open(path, "rb"):  # says why where it cannot be read
                    self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise InputError(f"{path} is missing{unfinished_download(path.parent)}") from None
            except (SafetensorError, OSError) as error:
                reason = odd_name(path) or ((cut_off(path) or disguise(path)) if path.is_file() else None)
                raise InputError(f"{path} cannot be read as safetensors: {reason or error}") from None
            for name in self._open[path].keys():  # noqa: SIM118 (not a dict)
                if name in self._file_of:
                    raise InputError(f"{name} is both in {self._file_of[name]} and in {path}")
                self._file_of[name] = path

    @property
    def names(self) -> list[str]:
        """Every tensor there is."""
        return list(self._file_of)

    def file_of(self, name: str) -> Path | None:
        """Return the file that has a tensor; None if there is no such tensor."""
        return self._file_of.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the format's name of a tensor's type, such as BF16."""
        return self._open[self._file_of[name]].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._open[self._file_of[name]].get_tensor(name)


def open_folder(folder: Path) -> TensorReader:
    """Open the weights of a model folder: ``model.safetensors``, or the files that its index lists.

    Raises:
        InputError: where there are none, with the way to convert others; where one is missing, cut off, not yet
            downloaded or outside of the folder; where the index is wrong.
    """
    if inside(folder, INDEX_FILE).is_file():
        return _open_indexed(folder)
    if not inside(folder, SINGLE_FILE).is_file():
        hint = other_weights(folder) or unfinished_download(folder)
        raise InputError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; weights must be safetensors{hint}")
    return TensorReader([_whole(folder, SINGLE_FILE)])


def _open_indexed(folder: Path) -> TensorReader:
    index, places = folder / INDEX_FILE, read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(
            f"{index} is not an index of safetensors files: it must have a weight_map, got {shown(places)}"
        )
    _check_only_set(folder, sorted({*map(str, places.values())} - {SINGLE_FILE}))
    try:
        path_of = {place: _whole(folder, place) for place in dict.fromkeys(map(str, places.values()))}
        reader = TensorReader(path_of.values())
    except InputError as error:
        raise InputError(f"{index} lists a file that cannot be used: {error}") from None
    for name, place in places.items():
        if reader.file_of(name) != path_of[str(place)]:
            raise InputError(f"{path_of[str(place)]} has no {name}, which {INDEX_FILE} says it has")
    return reader


def _check_only_set(folder: Path, others: Sequence[str]) -> None:
    """Raise ``InputError`` where an index names other files than the whole one beside it."""
    if others and inside(folder, SINGLE_FILE).is_file():
        raise InputError(
            f"{folder} has two sets of weights: {SINGLE_FILE}, which transformers takes, and those of {INDEX_FILE}, "
            f"which names {shown(others[0])}; remove one of the two files"
        )


def _whole(folder: Path, name: str) -> Path:
    """Return the path of a file with weights; aria2 makes its files as long as they will be before it fills them."""
    path = inside(folder, name)
    if inside(folder, f"{name}.aria2").is_file():
        raise InputError(f"{path} is not complete{unfinished_download(folder)}")
    return path


class TensorSpec(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of_file(cls, name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:
        """Return the spec of a tensor in a file, whose type has the format's name."""
        return cls(name, shape, _DTYPES[dtype])

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, specs: Sequence[TensorSpec], read: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> FileDigest:
    """Write one file, in order, each tensor read, converted and written before the next is read.

    Equal tensors give equal files.

    Args:
        path: of the file.
        specs: names, shapes and types of what is written.
        read: returns a tensor by name, on any device and of any type.
        metadata: texts for the header.

    Raises:
        ValueError: where a tensor has another shape than its spec.
    """
    return write_file(path, _chunks(specs, read, metadata or {}))


def write_sharded(
    folder: Path, specs: Sequence[TensorSpec], read: Callable[[str], Tensor], max_file_bytes: int = 5 * 10**9
) -> None:
    """Write tensors into a folder: one file, or several and their index where one would exceed ``max_file_bytes``.

    Args:
        folder: where the files go.
        specs: names, shapes and types of what is written.
        read: returns a tensor by name.
        max_file_bytes: size of a file's data, exceeded only by a single tensor that is larger.
    """
    groups: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if groups[-1] and sum(other.n_bytes for other in groups[-1]) + spec.n_bytes > max_file_bytes:
            groups.append([])
        groups[-1].append(spec)
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file_name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / file_name, group, read)
        places |= {spec.name: file_name for spec in group}
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(spec.n_bytes for spec in specs)}, "weight_map": places}
        write_file(folder / INDEX_FILE, [json.dumps(index, indent=2).encode() + b"\n"])


def header_of(specs: Iterable[TensorSpec], metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Return what stands before the data of a file with these tensors: the header and its length."""
    header: dict = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.n_bytes
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return len(text).to_bytes(8, "little") + text


def _chunks(
    specs: Sequence[TensorSpec], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    yield header_of(specs, metadata)
    for spec in specs:
        tensor = read(spec.name).detach().to("cpu", spec.dtype).contiguous()
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{spec.name} must have shape {spec.shape}, got {tuple(tensor.shape)}")
        yield tensor.view(-1).view(torch.uint8).numpy().data
