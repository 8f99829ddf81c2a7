"""Writing a checkpoint: gathered by rank 0, or each rank its shard. The format of both is in ``checkpoint.py``.

Either appears complete or not at all: one rename by rank 0 is the commit.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_gpt.config import RunConfig
from moe_gpt.config.yaml import to_yaml
from moe_gpt.distributed.process import Team
from moe_gpt.files.durable import FileDigest, complete_folder, write_file
from moe_gpt.files.tensors import TensorSpec, write_tensors
from moe_gpt.training.saving.checkpoint import FORMAT_VERSION, RunIdentity, Snapshot, read_config
from moe_gpt.training.saving.manifest import (
    CONFIG,
    GENERATORS,
    MANIFEST,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    WEIGHTS,
    shard_name,
)
from moe_gpt.training.saving.shards import open_tensors, write_pieces
from moe_gpt.training.saving.size import checkpoint_specs


def write_checkpoint(folder: Path, snapshot: Snapshot, identity: RunIdentity) -> None:
    """Write a checkpoint, replacing one of the same name. Equal state gives equal files.

    Raises:
        OSError: if it cannot be written; the old one is then intact.
    """
    with complete_folder(folder, replace=True) as temporary:
        tensors: Any = {WEIGHTS: snapshot.weights, OPTIMIZER: snapshot.optimizer}
        if identity.config.parallel.pipeline > 1:  # they came stage by stage
            for name, order in _orders(identity.config).items():
                tensors[name] = {each: tensors[name][each] for each in sorted(tensors[name], key=order)}
        written = {name: _write_tensors(temporary / name, values) for name, values in tensors.items()}
        _write_the_rest(temporary, snapshot, identity, written)


def write_shards(folder: Path, snapshot: Snapshot, identity: RunIdentity, team: Team) -> None:
    """Write a checkpoint with the shards of all ranks, each of which must call this, and rename it.

    Raises:
        OSError: on all ranks, if any of them cannot write; what was there under that name is then intact.
    """
    with contextlib.ExitStack() as stack:
        begin = lambda: str(stack.enter_context(complete_folder(folder, replace=True)))  # noqa: E731
        temporary = Path(team.from_main(begin))
        written: dict[str, FileDigest] = {}
        for digests in team.all_of(lambda: _write_own_shards(temporary, snapshot, team)):
            written |= {name: FileDigest(*digest) for name, digest in digests.items()}

        def commit() -> None:
            _write_the_rest(temporary, snapshot, identity, written)
            stack.close()

        team.from_main(commit)


def merge_shards(folder: Path) -> None:
    """Replace a verified checkpoint of shards by the same one gathered: the files that rank 0 alone would have written.

    Raises:
        OSError: if it cannot be written; the shards are then intact.
    """
    with complete_folder(folder, replace=True) as temporary:
        written = {}
        for name, order in _orders(read_config(folder)).items():
            reader = open_tensors(folder, name)
            names = sorted(reader.names, key=order)
            specs = [TensorSpec.of_file(each, reader.shape(each), reader.dtype(each)) for each in names]
            written[name] = write_tensors(temporary / name, specs, reader.read)
        for name in (GENERATORS, STATE, CONFIG, TOKENIZER):
            written[name] = write_file(temporary / name, [(folder / name).read_bytes()])
        _write_manifest(temporary, written)


def _orders(config: RunConfig) -> dict[str, Callable[[str], int]]:
    """Return, for each file, the place of each tensor of one process; those of a user's router come last."""

    def order(specs: Sequence[TensorSpec]) -> Callable[[str], int]:
        places = {spec.name: place for place, spec in enumerate(specs)}
        return lambda name: places.get(name, len(places))

    return dict(zip((WEIGHTS, OPTIMIZER), map(order, checkpoint_specs(config)), strict=True))


def _write_own_shards(folder: Path, snapshot: Snapshot, team: Team) -> dict[str, FileDigest]:
    pieces: Any = {WEIGHTS: snapshot.weights, OPTIMIZER: snapshot.optimizer}
    files = {shard_name(name, team.rank, team.size): own for name, own in pieces.items()}
    return {name: write_pieces(folder / name, own) for name, own in files.items()}


def _write_the_rest(folder: Path, snapshot: Snapshot, identity: RunIdentity, written: Mapping[str, FileDigest]) -> None:
    """Write random generators, texts and the manifest; ``written`` has the other files."""
    state = {
        "format_version": FORMAT_VERSION,
        **snapshot.progress,
        "data_fingerprint": identity.data_fingerprint,
        "environment": identity.environment,
        "initialised_from": identity.initialised_from,
        "changes": list(identity.changes),
        "router": identity.router,
        "schedule": identity.schedule,
    }
    texts = {
        STATE: json.dumps(state, indent=2),
        CONFIG: to_yaml(identity.config),
        TOKENIZER: identity.tokenizer.to_json(),
    }
    files = {**written, GENERATORS: _write_tensors(folder / GENERATORS, snapshot.generators)}
    files |= {name: write_file(folder / name, [text.encode("utf-8")]) for name, text in texts.items()}
    _write_manifest(folder, files)


def _write_manifest(folder: Path, files: Mapping[str, FileDigest]) -> None:
    manifest = {name: file._asdict() for name, file in files.items()}
    write_file(folder / MANIFEST, [json.dumps(manifest, indent=2).encode()])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileDigest:
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    return write_tensors(path, specs, tensors.__getitem__)
