"""Safetensors written by us, read by the library."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_gpt.errors import InputError
from moe_gpt.files.tensors import TensorReader, TensorSpec, open_folder, write_sharded, write_tensors

TENSORS = {name: torch.randn(shape) for name, shape in [("a", (3, 5)), ("b", (7,)), ("c", (2, 2, 2)), ("d", (40,))]}


def specs(dtype: torch.dtype = torch.float32) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), dtype) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_library_reads_what_was_written(dtype, tmp_path):
    """Names, shapes, type and values, and the mark that transformers wants."""
    write_sharded(tmp_path, specs(dtype), TENSORS.__getitem__)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor.to(dtype)) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_files_stay_below_their_limit(tmp_path):
    """Except for a single tensor that is larger; the index knows where everything is."""
    write_sharded(tmp_path, specs(), TENSORS.__getitem__, max_file_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (15 + 7 + 8 + 40)
    assert [index["weight_map"][name][6:11] for name in "abcd"] == ["00001", "00001", "00002", "00003"]
    reader = open_folder(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_one_tensor_is_read_at_a_time(tmp_path):
    """Each is on disk before the next is asked for, so a model need not fit in memory twice."""
    sizes = []

    def read(name: str) -> torch.Tensor:
        sizes.append((tmp_path / "model.safetensors").stat().st_size if sizes else 0)
        return torch.ones(100_000)

    large = [TensorSpec(str(i), (100_000,), torch.float32) for i in range(4)]
    write_sharded(tmp_path, large, read)
    assert [size // 400_000 for size in sizes] == [0, 1, 2, 3]


def test_wrong_shape_is_an_error(tmp_path):
    """The header is written first and must be true."""
    with pytest.raises(ValueError, match=r"b must have shape \(7,\), got \(3,\)"):
        write_tensors(tmp_path / "x", specs(), lambda name: TENSORS[name][:3])


def test_name_in_two_files_is_an_error(tmp_path):
    """Which one is right cannot be known."""
    for name in ("x", "y"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(InputError, match="a is both in .*x and in .*y"):
        TensorReader([tmp_path / "x", tmp_path / "y"])
