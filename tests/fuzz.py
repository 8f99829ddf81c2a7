"""Files as strangers might change them: every reader ends in its result or in an error of ours, and stays inside.

    python tests/fuzz.py --mutations 10000 --seed 1 [--only config.json] [--first 123]

Each reader has a small valid example. A mutation changes one of its files, by a generator that knows only the seed,
the reader and the mutation's number, so any of them can be repeated. What counts as found: an exception that is no
InputError (or FileNotFoundError), more than 10 seconds, more memory than 64 MB and four times the example, a file
outside of the example that was opened, and one that was written. Memory is what Python sets aside, in every 50th
mutation, and on Linux what the process holds in each, which counts the memory of libraries.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import copy
import gzip
import json
import lzma
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import made_up_checkpoint
import made_up_run
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy
import yaml
import zstandard
from tiny_models import tiny_model

from moe_gpt.config import SourceConfig
from moe_gpt.data.corpus import iterate_documents
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.durable import read_digest
from moe_gpt.files.tensors import TensorSpec, open_folder, write_sharded
from moe_gpt.interop import hugging_face
from moe_gpt.report.run_records import read_run
from moe_gpt.training.records.metrics import read_metrics, scores_at
from moe_gpt.training.saving import checkpoint
from moe_gpt.training.saving.changes import find_changes
from moe_gpt.training.saving.listing import list_checkpoints, verify_checkpoint
from moe_gpt.training.saving.manifest import FILES, MANIFEST
from moe_gpt.training.saving.saved_model import load_model, open_checkpoint

MOST_SECONDS, MOST_BYTES = 10, 64 * 2**20
TRACED_SLOWDOWN = 25
"""So much longer may a reading take whose memory is traced: 100,000 brackets as YAML take 0.9 s, traced 22 s."""
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**62, 2**63, 10**30, 10**400, -(10**18), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "\ud800", "\x1b[2J", "x" * 10_000, "../outside/secret", "/etc/passwd", "..", ".",
    "a/b", "C:\\secret", "outside\\secret", [], {}, [[]], [None], {"": None}, {"a": {"b": [1]}},
]  # fmt: skip
"""Values that a reader of JSON may not expect."""
NOT_READ = (
    b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"<!DOCTYPE html><html>", b"\0" * 4096,
    b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"PK\x03\x04", b"\n" * 500,
)  # fmt: skip
"""Files that are found in the place of others."""


class Reader(NamedTuple):
    """Something that reads files of strangers."""

    make: Callable[[Path], None]
    """Fills a folder with a valid example."""
    files: tuple[str, ...]
    """The files that are changed, as patterns."""
    read: Callable[[Path], Any]
    """Reads the folder."""
    mend: Callable[[Path], Any] = lambda folder: None
    """What a stranger does after a change, so that it is not found at once."""


class Found(Exception):  # noqa: N818 (not an error of the program)
    """What a reader must not do."""


def make_model_folder(folder: Path) -> None:
    """A Mixtral of 17 small tensors with a tokenizer, its weights in several files."""
    tokenizer = train_tokenizer(["the quick brown fox " * 20], 280)
    model = tiny_model(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=2, head_dim=4, d_ff=8, n_layers=1)
    hugging_face.save(model, folder, tokenizer)
    reader = open_folder(folder)
    specs = [TensorSpec(name, reader.shape(name), reader.read(name).dtype) for name in reader.names]
    write_sharded(folder, specs, reader.read, max_file_bytes=10_000)
    (folder / "model.safetensors").unlink()


def make_checkpoint(folder: Path) -> None:
    """A run folder with a checkpoint of a tiny model."""
    made_up_checkpoint.save_checkpoint(folder, *_run())


_kept: list = []


def _run() -> Any:
    if not _kept:
        _kept.extend(made_up_checkpoint.make_run(n_layers=1, d_model=8, head_dim=4, d_ff=8))
    return _kept


def make_run_folder(folder: Path) -> None:
    """What reports read: a config, metrics, events, a tokenizer and the arrays of an evaluation."""
    run = made_up_run.make_run()
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.config))
    for name, lines in (("metrics", [*run.steps[:4], *run.records[:1], *run.evaluations]), ("events", run.events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tokenizer.json").write_text(train_tokenizer(["a b c"], 260).to_json())
    for arrays in run.arrays[:1]:
        values = {f"{source}/nats": nats for source, nats in arrays.nats.items()}
        values |= {f"{source}/tokens_per_expert": counts for source, counts in arrays.tokens_per_expert.items()}
        for source, part in arrays.slices.items():
            values |= {f"{source}/tokens": part.tokens, f"{source}/choices": np.ascontiguousarray(part.choices)}
        safetensors.numpy.save_file(values, folder / "evaluations" / f"step_{arrays.step:08d}.safetensors")


def read_model_folder(folder: Path) -> None:
    """Read it as generate does, and use the tokenizer."""
    loaded = hugging_face.load_with_tokenizer(folder)
    ids = loaded.tokenizer.encode("the quick \u00e9 <|endoftext|>")
    if any(index >= loaded.model.config.vocab_size for index in [*ids, *loaded.text_start]):
        raise Found("a token beyond the embedding")
    list(loaded.tokenizer.decode_stream(ids))


def read_checkpoint(folder: Path) -> None:
    """Read it as generate, export and --resume do."""
    load_model(folder)
    saved, (state, identity) = open_checkpoint(folder), _run()
    verify_checkpoint(saved.path)
    find_changes(saved.config, checkpoint.read_state(saved.path), identity)
    checkpoint.load_training_state(state, saved.path)


def read_records(folder: Path) -> None:
    """Read it as reports, and the log's readers in training and export, do."""
    read_run(folder)
    with contextlib.suppress(OSError):
        read_metrics(folder / "metrics.jsonl")
        scores_at(folder / "metrics.jsonl", 15)


IN_A_CHECKPOINT = (*FILES, MANIFEST)


def mend_manifest(folder: Path) -> None:
    """Make the manifest agree with the files."""
    for path in list_checkpoints(folder):
        if all((path / name).is_file() and not (path / name).is_symlink() for name in IN_A_CHECKPOINT):
            manifest = {name: read_digest(path / name)._asdict() for name in FILES}
            (path / MANIFEST).write_text(json.dumps(manifest))


_STEP = "checkpoints/step_*/"
ROWS = [{"text": f"row {number} \u00e9 text", "n": number} for number in range(20)]


def make_data_files(folder: Path) -> None:
    """Files of every format and compression, with the same rows; each is a folder's only file of its kind."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = "".join(["text,n\n", *(f'"row {row["n"]}, ""q"" \u00e9",{row["n"]}\n' for row in ROWS)]).encode()
    contents = {
        "a.jsonl": lines, "a.json": json.dumps(ROWS).encode(), "a.csv": table, "a.tsv": table.replace(b",", b"\t"),
        "a.txt": b"some text \xc3\xa9\n" * 20, "b.jsonl.gz": gzip.compress(lines, mtime=0),
        "b.jsonl.bz2": bz2.compress(lines), "b.csv.xz": lzma.compress(table), "b.jsonl.zst": zstandard.compress(lines),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    columns = pyarrow.table({key: [row[key] for row in ROWS] for key in ("text", "n")})
    pyarrow.parquet.write_table(columns, folder / "a.parquet")
    for name, make in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with make(str(folder / name), columns.schema) as writer:
            writer.write_table(columns)


def read_data_files(folder: Path) -> None:
    """Read each file as a source of its own, so that no error hides another; users may link their own texts."""
    errors = []
    for path in sorted(path for path in folder.iterdir() if not path.is_symlink()):
        try:
            list(iterate_documents(SourceConfig(name="s", files=str(path))))
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0]


READERS = {
    "weights": Reader(make_model_folder, ("model-*.safetensors",), hugging_face.load),
    "index": Reader(make_model_folder, ("model.safetensors.index.json",), open_folder),
    "config.json": Reader(make_model_folder, ("config.json",), hugging_face.check),
    "tokenizer.json": Reader(make_model_folder, ("tokenizer.json", "tokenizer_config.json"), read_model_folder),
    "model folder": Reader(make_model_folder, ("*",), read_model_folder),
    "run folder": Reader(make_run_folder, ("*.*", "evaluations/*"), read_records),
    "metrics.jsonl": Reader(make_run_folder, ("metrics.jsonl", "events.jsonl"), read_records),
    "checkpoint": Reader(make_checkpoint, (_STEP + "*",), read_checkpoint, mend_manifest),
    "manifest": Reader(make_checkpoint, (_STEP + MANIFEST,), read_checkpoint),
    "state": Reader(make_checkpoint, (_STEP + "state.json", _STEP + "config.yaml"), read_checkpoint, mend_manifest),
    "rows of text": Reader(make_data_files, ("a.json*", "a.?sv", "a.txt"), read_data_files),
    "columns": Reader(make_data_files, ("*.parquet", "*.arrow"), read_data_files),
    "compressed": Reader(make_data_files, ("b.*.*",), read_data_files),
}


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    """Flip bits, cut, insert, repeat or overwrite, once or a few times."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        start, size = dice.randint(0, len(changed)), dice.choice((1, 2, 8, 64, 1000))
        piece = changed[start : start + size]
        match dice.randrange(6):
            case 0 if piece:
                changed[start] ^= 1 << dice.randrange(8)
            case 1:
                del changed[start:]
            case 2:
                del changed[start : start + size]
            case 3:
                changed[start:start] = dice.randbytes(size)
            case 4:
                changed[dice.randint(0, len(changed)) :][:0] = piece
                changed[start:start] = piece * dice.choice((1, 3, 50))
            case _:
                changed[start : start + size] = dice.choice((b"\0", b"\xff", b"9", b"[", b'"', b"}")) * len(piece)
    return bytes(changed)


def change_value(value: Any, dice: random.Random) -> Any:
    """Replace, remove, rename or repeat something in a value of JSON."""
    value = copy.deepcopy(value)
    holder, key = value, None
    while isinstance(holder, dict | list) and holder:
        key = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not (isinstance(holder[key], dict | list) and holder[key]) or dice.random() < 0.2:
            break
        holder = holder[key]
    if key is None:
        return dice.choice(ODD)
    match dice.randrange(7):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[dice.choice(("", "x", "../secret", key.upper() if isinstance(key, str) else "k"))] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder[key:key] = [holder[key]] * dice.choice((1, 100))
        case 3 if isinstance(holder[key], int):
            holder[key] += dice.choice((-1, 1, 1000))
        case _:
            holder[key] = copy.deepcopy(dice.choice(ODD))
    return value


def change_text(path: Path, data: bytes, dice: random.Random) -> bytes:
    """Change a value in a file, whatever its format, so that it stays a file of this format."""
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(change_value(json.loads(data[8 : 8 + size]), dice)).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    if path.suffix == ".yaml":
        return yaml.safe_dump(change_value(yaml.safe_load(data), dice)).encode("utf-8", "replace")
    if path.suffix == ".jsonl":
        lines = data.splitlines()
        place = dice.randrange(len(lines))
        lines[place] = json.dumps(change_value(json.loads(lines[place]), dice)).encode()
        return b"\n".join(lines)
    return json.dumps(change_value(json.loads(data), dice)).encode()


def mutate(path: Path, outside: Path, dice: random.Random) -> None:
    """Change a file, or put something else in its place."""
    data, kind = path.read_bytes(), dice.random()
    if kind < 0.06:
        path.unlink()
        targets = [outside / "secret", outside, "nowhere", path.name, "/dev/zero", f"../{outside.name}/secret"]
        path.symlink_to(dice.choice(targets))
    elif kind < 0.08:
        path.unlink()
        dice.choice((lambda: None, path.mkdir, lambda: os.mkfifo(path)))()
    elif kind < 0.12:
        path.write_bytes(dice.choice(NOT_READ))
    elif kind < 0.55:
        path.write_bytes(change_bytes(data, dice))
    else:
        try:
            path.write_bytes(change_text(path, data, dice))
        except (ValueError, yaml.YAMLError):
            path.write_bytes(change_bytes(data, dice))


opened: list[Path] = []
"""Files that Python has opened since the list was emptied."""
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)


def check(reader: Reader, folder: Path, outside: Path, measure_memory: bool) -> str:
    """Read a changed folder; return how it ended.

    Raises:
        Found: for whatever a reader must not do.
    """
    before = sorted((path, path.lstat().st_mtime_ns) for path in outside.rglob("*"))
    opened.clear()
    started = time.perf_counter()
    most_seconds = MOST_SECONDS * (TRACED_SLOWDOWN if measure_memory else 1)
    signal.alarm(2 * most_seconds)
    resident = reset_resident()
    if measure_memory:
        tracemalloc.start()
    try:
        reader.read(folder)
        ending = "read"
    except (InputError, FileNotFoundError) as error:
        ending = "refused"
        str(error).encode()  # a message that cannot be printed is none
    except Found:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Found(f"{type(error).__name__}: {error}"[:300]) from error
    finally:
        signal.alarm(0)
        peak = max(tracemalloc.get_traced_memory()[1], most_resident() - resident)
        tracemalloc.stop()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    seconds = time.perf_counter() - started
    if seconds > most_seconds or peak > MOST_BYTES + 4 * size:
        raise Found(f"{seconds:.1f} seconds, {peak / 1e6:.0f} MB of memory for {size / 1e6:.1f} MB of files")
    led = [path for path in opened if isinstance(path, str | Path) and _is_outside(path, outside)]
    if led or before != sorted((path, path.lstat().st_mtime_ns) for path in outside.rglob("*")):
        raise Found(f"it reads or writes outside: {led}")
    return ending


def reset_resident() -> int:
    """Forget the most memory the process has held, libraries' own included, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return most_resident()
    return sys.maxsize


def most_resident() -> int:
    """Return the most bytes of memory that the process has held since then."""
    with contextlib.suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return 0


def _stop(signum: int, frame: Any) -> None:
    raise TimeoutError("too slow")


def _is_outside(path: str | Path, outside: Path) -> bool:
    real = os.path.realpath(path)
    return real.startswith(str(outside)) or real in ("/etc/passwd", "/dev/zero")


def fuzz(name: str, n_mutations: int, seed: int, first: int = 0) -> Iterator[tuple[int, str | Found]]:
    """Yield the ending of each mutation by its number."""
    reader = READERS[name]
    signal.signal(signal.SIGALRM, _stop)
    with tempfile.TemporaryDirectory() as place:
        root = Path(os.path.realpath(place))
        sample, folder, outside = root / "sample", root / "x" / "folder", root / "x" / "outside"
        outside.mkdir(parents=True)
        reader.make(sample)
        (outside / "secret").write_bytes(b"{}")
        files = sorted(path.relative_to(sample) for pattern in reader.files for path in sample.glob(pattern))
        shutil.copytree(sample, folder)
        reader.read(folder)
        for number in range(first, first + n_mutations):
            dice = random.Random(f"{seed}/{name}/{number}")
            shutil.rmtree(folder)
            shutil.copytree(sample, folder)
            mutate(folder / dice.choice(files), outside, dice)
            if dice.random() < 0.8:
                reader.mend(folder)
            try:
                yield number, check(reader, folder, outside, number % 50 == 0)
            except Found as found:
                yield number, found


def main() -> int:
    """Fuzz all readers, print what is found, and return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", choices=READERS)
    options = parser.parse_args()
    n_found = 0
    for name in [options.only] if options.only else READERS:
        started, counts = time.perf_counter(), dict.fromkeys(("read", "refused", "found"), 0)
        for number, ending in fuzz(name, options.mutations, options.seed, options.first):
            counts[ending if isinstance(ending, str) else "found"] += 1
            if isinstance(ending, Found):
                print(f"  {name}, seed {options.seed}, mutation {number}: {ending}", flush=True)
        n_found += counts["found"]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - started
        print(f"{name}, seed {options.seed}: {counts}, {seconds:.0f} s, at most {memory:.0f} MB so far", flush=True)
    return n_found > 0


if __name__ == "__main__":
    sys.exit(main())
