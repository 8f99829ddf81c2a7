"""Shards that do not fit together are refused, and whole ones are one checkpoint."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moe_gpt.commands.checkpoint import merge
from moe_gpt.errors import InputError
from moe_gpt.training.saving.manifest import FILES, MANIFEST, OPTIMIZER, WEIGHTS, files_of, shard_name
from moe_gpt.training.saving.run_folder import hold
from moe_gpt.training.saving.shards import Piece, ShardReader, write_pieces


def shards_of_one_rank(folder):
    """Turn a gathered checkpoint into one of shards by one rank; only the manifest's names are right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (WEIGHTS, OPTIMIZER):
        (folder / name).rename(folder / shard_name(name, 0, 1))
        manifest[shard_name(name, 0, 1)] = manifest.pop(name)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def write(folder, *pieces_of_ranks):
    paths = []
    for rank, pieces in enumerate(pieces_of_ranks):
        paths.append(folder / f"model-{rank}.safetensors")
        write_pieces(paths[-1], [Piece("a", offsets, tensor) for offsets, tensor in pieces])
    return paths


def test_pieces_become_the_whole_tensor_again(tmp_path):
    """Several pieces of a rank, and pieces along two dimensions."""
    whole = torch.randn(6, 4)
    mine, other = [((0, 0), whole[:2, :3]), ((4, 0), whole[4:])], [((0, 3), whole[:2, 3:]), ((2, 0), whole[2:4])]
    reader = ShardReader(write(tmp_path, mine, other))
    assert reader.names == ["a"]
    assert reader.shape("a") == (6, 4)
    assert torch.equal(reader.read("a"), whole)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([((0,), torch.ones(2)), ((3,), torch.ones(2))], "have 4 of 5 numbers"),
        ([((0,), torch.ones(2)), ((1,), torch.ones(2))], "have 4 of 3 numbers"),
        ([((0, 0), torch.ones(2))], "has no place"),
    ],
)
def test_pieces_that_do_not_fill_a_tensor_are_refused(tmp_path, pieces, text):
    with pytest.raises(InputError, match=text):
        ShardReader(write(tmp_path, pieces))


@pytest.mark.parametrize("metadata", [{}, {"DCP_SHARDING_INFO": "{"}, {"DCP_SHARDING_INFO": json.dumps({"a": 1})}])
def test_files_without_places_are_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata)
    with pytest.raises(InputError, match=r"model\.safetensors has no places of pieces"):
        ShardReader([path])


def test_a_gathered_checkpoint_is_left_alone(tmp_path, capsys):
    from made_up_checkpoint import make_run, save_checkpoint

    path = save_checkpoint(tmp_path, *make_run())
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    merge(tmp_path)
    assert "has no shards" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_no_checkpoint_is_merged_while_its_run_trains(tmp_path):
    """Training deletes checkpoints that it does not keep, and leftovers of writes."""
    from made_up_checkpoint import make_run, save_checkpoint

    path = save_checkpoint(tmp_path, *make_run())
    shards_of_one_rank(path)
    before = sorted(path.iterdir())
    for given in (tmp_path, path):
        with hold(tmp_path), pytest.raises(InputError, match="is in use by another training process; wait until it"):
            merge(given)
    assert sorted(path.iterdir()) == before


def test_a_manifest_may_list_the_files_of_five_thousand_ranks(tmp_path):
    file = {"bytes": 10**9, "sha256": "0" * 64}
    names = [shard_name(name, rank, 5_000) for name in (WEIGHTS, OPTIMIZER) for rank in range(5_000)]
    (tmp_path / MANIFEST).write_text(json.dumps(dict.fromkeys([*names, *FILES[2:]], file), indent=2))
    assert len(files_of(tmp_path, FILES)) == len(names) + 4
