"""Several processes train what one process trains, whatever the layout."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from ranks import Cases, finish, free_port, start, train_cases, variables
from safetensors.torch import load_file
from small_runs import CPU, run_training, steps

from moe_gpt.config import RunConfig
from moe_gpt.inference.generate import generate
from moe_gpt.training.records.metrics import read_metrics
from moe_gpt.training.saving.checkpoint import load_training_state, take_snapshot
from moe_gpt.training.saving.listing import verify_checkpoint
from moe_gpt.training.saving.saved_model import load_model, resolve_checkpoint
from moe_gpt.training.saving.write import merge_shards
from moe_gpt.training.setup import build_state

M = 32
"""Tokens of a rank in a forward pass: two sequences of the first stage, one of the second."""
STAGES = [
    {"until_tokens": 320, "seq_len": 16, "batch_tokens": 128},  # two full steps and one that ends on the border
    {"until_tokens": 544, "seq_len": 32, "batch_tokens": 192},  # and a last one of one sequence, for any ranks
]
N_STEPS = 5
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"model.balance": "bias", "model.tie_embeddings": True, "model.attention_sharing": 2},
    "masked": {"data.document_masking": True, "model.attention_sharing": 2, "model.tie_embeddings": True},
    "muon": {"optimizer.name": "muon"},
    "tied": {"model.balance": "bias", "model.tie_embeddings": True},
    "grouped": {"model.n_heads": 4, "model.n_kv_heads": 2, "model.tie_embeddings": True}
    | {"data.tokenizer": {"vocab_size": 401}},
    "checkpointing": {"train.activation_checkpointing": True, "model.attention_sharing": 2},
    "deep": {"model.n_layers": 4, "model.tie_embeddings": True},
    "uneven": {"model.n_layers": 6, "model.attention_sharing": 2, "train.micro_batch_tokens": 48},  # 3, 3, 2 sequences
    "deep bias": {"model.n_layers": 4, "model.balance": "bias", "data.document_masking": True}
    | {"train.activation_checkpointing": True},
    "deep muon": {"model.n_layers": 4, "model.attention_sharing": 2, "optimizer.name": "muon"},
    "dense": {"model.n_layers": 4, "model.n_experts": 1, "model.top_k": 1},
}


@pytest.fixture(scope="module")
def values(small_values) -> dict:
    """A run of five steps with accumulation, a border, and fewer sequences than ranks at the end."""
    found = copy.deepcopy(small_values)
    found["schedule"] = {"stages": STAGES, "warmup_tokens": 512}
    found["train"] |= {"log_every_steps": 1, "record_every_steps": 1, "micro_batch_tokens": M}
    found["loss"] = {"load_balancing_loss_weight": 0.05}
    found["data"]["validation_tokens"] = 96
    return found


def changed(values: dict, settings: dict[str, Any]) -> dict:
    """Return values with some settings of sections changed."""
    found = copy.deepcopy(values)
    for key, value in settings.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


@pytest.fixture(scope="module")
def reference(values, tmp_path_factory):
    """A function that returns the folder of a variant, trained by one process for so many ranks."""
    folder = tmp_path_factory.mktemp("alone")

    def train(variant: str, n_ranks: int) -> Path:
        run_dir = folder / f"{variant}-{n_ranks}"
        if not run_dir.exists():
            settings = dict(VARIANTS[variant])
            settings["train.micro_batch_tokens"] = settings.get("train.micro_batch_tokens", M) * n_ranks
            run_training(RunConfig.from_mapping(changed(values, settings)), run_dir)
        return run_dir

    return train


def case(values: dict, variant: str = "plain", parallel: dict | None = None, **more: Any) -> dict[str, Any]:
    """Return a case for ``train_cases``."""
    settings = {f"parallel.{key}": value for key, value in (parallel or {}).items()}
    return {"values": changed(values, VARIANTS[variant] | settings), **more}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint."""
    return load_file(resolve_checkpoint(run_dir) / "model.safetensors")


def files(run_dir: Path) -> list[bytes]:
    """Return the tensors of the newest checkpoint, as they are on the disk."""
    folder = resolve_checkpoint(run_dir)
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors")]


def differences(found: Path, wanted: Path) -> dict[str, float]:
    """Return how far two runs are apart."""
    (mine, other), losses = (steps(folder) for folder in (found, wanted)), ("loss", "ce_loss", "load_balancing_loss")
    assert [line["tokens_seen"] for line in mine] == [line["tokens_seen"] for line in other]
    norms = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(mine, other, strict=True)]
    lines, other_lines = (read_metrics(folder / "metrics.jsonl") for folder in (found, wanted))
    records = [(a, b) for a, b in zip(lines, other_lines, strict=True) if "groups" in a and b["step"] == a["step"]]
    evaluated = [(a, b) for a, b in zip(lines, other_lines, strict=True) if "val/prose/ce_loss" in a]
    routed = [(a["routing"], b["routing"]) for a, b in records if "routing" in b]  # none if dense
    assert len(records) == N_STEPS
    assert len(evaluated) == 2
    apart = {
        "loss": max(abs(a[key] - b[key]) for a, b in zip(mine, other, strict=True) for key in losses),
        "grad_norm": max(norms),
        "load": max((np.abs(np.subtract(a["load"], b["load"])).max() for a, b in routed), default=0.0),
        "observed": max(
            (
                np.abs(np.subtract(a[key], b[key])).max()
                for a, b in routed
                for key in ("token_entropy", "margin", "largest_logit", "router_z_loss", "load_balancing_loss")
            ),
            default=0.0,
        ),
        "group norms": max(
            abs(a["groups"][group][kind] - value) / max(value, 1e-3)
            for a, b in records
            for group, kinds in b["groups"].items()
            for kind, value in kinds.items()
        ),
        "validation": max(abs(a[key] - b[key]) for a, b in evaluated for key in b if key.endswith("ce_loss")),
        "bytes": max(abs(a[key] - b[key]) for a, b in evaluated for key in b if key.endswith("per_byte")),
    }
    own, theirs = weights(found), weights(wanted)
    assert own.keys() == theirs.keys()
    return apart | {"weights": max(float((own[name] - theirs[name]).abs().max()) for name in own)}


LIMITS = {"loss": 5e-6, "grad_norm": 1e-5, "load": 0, "observed": 2e-5, "group norms": 2e-5}
LIMITS |= {"validation": 5e-6, "bytes": 5e-6, "weights": 1e-5}
LIMITS_IN_BF16 = {"grad_norm": 1e-4, "observed": 1e-4, "group norms": 1e-3, "weights": 1e-3}
"""Muon's directions are computed in bfloat16, where the last bit of a gradient can turn the last bit of a direction.
The next gradients are then those of other weights (their norm: 1.2e-5 apart on an Intel processor with AMX)."""


def is_equal(apart: dict[str, float], variant: str = "plain") -> bool:
    """Whether two runs are equal, but for the order of sums."""
    limits = LIMITS | (LIMITS_IN_BF16 if "muon" in variant else {})
    return all(value <= limits[name] for name, value in apart.items())


@pytest.fixture(scope="module")
def pair(values, tmp_path_factory):
    """Two processes that train several cases."""
    folder = tmp_path_factory.mktemp("pair")
    quiet = changed(values, {"train.sample_tokens": 0, "train.record_tokens": 0})
    shards = changed(quiet, {"checkpoint.format": "sharded"})
    cases: Cases = {
        "zero 3": case(values),
        "sharded half": case(shards, limits={"max_steps": 3}, folder="sharded"),
        "sharded": case(shards, resume=True),
        "experts": case(values, "bias", {"expert": 2}),
        "stages": case(values, "tied", {"pipeline": 2}),
        "half": case(quiet, limits={"max_steps": 3}, folder="resumed"),
        "resumed": case(quiet, resume=True),
        "unbalanced": case(quiet, spoil="local counts", limits={"max_steps": 1}),
    }
    return folder, train_cases(cases, 2, folder)


@pytest.mark.parametrize(
    ("name", "variant", "n_data"), [("zero 3", "plain", 2), ("experts", "bias", 2), ("stages", "tied", 1)]
)
def test_two_processes_train_what_one_trains(pair, reference, name, variant, n_data):
    folder, ended = pair
    assert ended[name] == "finished"
    apart = differences(folder / name, reference(variant, n_data))
    assert is_equal(apart), apart


def routers_gradient(run_dir: Path) -> float:
    """Return the norm of the routers' gradient in the first step."""
    line = next(line for line in read_metrics(run_dir / "metrics.jsonl") if "groups" in line)
    return line["groups"]["routers"]["gradient_norm"]


def test_counts_of_one_rank_alone_would_be_found(pair, reference):
    """A balancing loss of each rank's own counts is another loss: the test above would fail."""
    mine, other = (routers_gradient(folder) for folder in (pair[0] / "unbalanced", reference("plain", 2)))
    assert abs(mine / other - 1) > 100 * LIMITS["group norms"]
    assert routers_gradient(pair[0] / "zero 3") == pytest.approx(other, rel=LIMITS["group norms"])


def test_a_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(pair):
    folder, ended = pair
    assert ended["half"] == "max_steps"
    assert files(folder / "resumed") == files(folder / "zero 3")


def test_shards_are_merged_into_the_bytes_of_a_gathered_checkpoint(pair, tmp_path):
    """A run with shards resumes, its model is used as any other, and PyTorch's own reader reads them."""
    folder = pair[0] / "sharded"
    shards = resolve_checkpoint(folder)
    assert len(list(shards.glob("model-*-of-00002.safetensors"))) == 2
    wanted = weights(pair[0] / "zero 3")
    loaded = dict(load_model(folder).model.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    read = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(shards)), no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in wanted.items())
    merged = tmp_path / "run"
    shutil.copytree(folder, merged)
    merge_shards(resolve_checkpoint(merged))
    assert files(merged) == files(pair[0] / "zero 3")
    verify_checkpoint(resolve_checkpoint(merged))


@pytest.mark.parametrize("name", ["experts", "stages"])
def test_a_checkpoint_does_not_depend_on_the_layout(pair, name):
    """One process reads what two have written, would write the same bytes again, and goes on with it."""
    folder = pair[0] / name
    loaded = load_model(folder)
    assert len(list(generate(loaded.model, [1, 2, 3], 4))) <= 4
    state = build_state(loaded.config, CPU)
    load_training_state(state, loaded.path)
    snapshot = take_snapshot(state)
    for file, tensors in (("model", snapshot.weights), ("optimizer", snapshot.optimizer)):
        saved = load_file(loaded.path / f"{file}.safetensors")
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[key], tensors[key]) for key in saved)


@pytest.mark.parametrize(("name", "variant", "n_data"), [("zero 3", "plain", 2), ("stages", "tied", 1)])
def test_samples_and_arrays_are_those_of_one_process(pair, reference, name, variant, n_data):
    """Before the first step, when weights are equal to the bit."""
    folder, alone = pair[0] / name, reference(variant, n_data)
    texts = [read_metrics(path / "metrics.jsonl")[0]["samples"] for path in (folder, alone)]
    assert texts[0] == texts[1]
    own, theirs = (load_file(path / "evaluations" / "step_00000000.safetensors") for path in (folder, alone))
    assert own.keys() == theirs.keys()
    assert all(torch.allclose(own[key].double(), theirs[key].double(), atol=1e-5) for key in own)


SHARDED = [
    (2, "muon", {"zero": 1}),
    (2, "grouped", {"tensor": 2}),
    (4, "bias", {"tensor": 2}),
    (4, "bias", {"expert": 2, "replicate": 2}),
    (4, "masked", {"tensor": 2, "expert": 2}),
    (3, "plain", {}),
    (3, "bias", {"zero": 1}),
    (2, "tied", {"pipeline": 2}),
    (4, "deep", {"pipeline": 2, "tensor": 2, "pipeline_schedule": "interleaved"}),
    (4, "deep bias", {"pipeline": 2, "expert": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "variant", "parallel"), SHARDED)
def test_shards_of_every_layout_are_merged_into_a_gathered_checkpoint(values, tmp_path, size, variant, parallel):
    """Byte for byte; and another number of processes resumes from them."""
    quiet = changed(values, {"train.sample_tokens": 0, "train.record_tokens": 0, "train.micro_batch_tokens": 192})
    shards = changed(quiet, {"checkpoint.format": "sharded"})
    stop = {"limits": {"max_steps": 2}}
    cases = {"gathered": case(quiet, variant, parallel, **stop), "sharded": case(shards, variant, parallel, **stop)}
    train_cases(cases, size, tmp_path)
    shutil.copytree(tmp_path / "sharded", tmp_path / "resumed")
    merge_shards(resolve_checkpoint(tmp_path / "sharded"))
    assert files(tmp_path / "sharded") == files(tmp_path / "gathered")
    for name in ("gathered", "resumed"):
        run_training(RunConfig.from_mapping(changed(quiet, VARIANTS[variant])), tmp_path / name, None, True)
    assert files(tmp_path / "resumed") == files(tmp_path / "gathered")


LAYOUTS = [
    (2, "plain", {"zero": 0}),
    (2, "plain", {"zero": 2}),
    (2, "masked", {"zero": 1}),
    (2, "bias", {"zero": 2}),
    (2, "muon", {}),
    (2, "muon", {"expert": 2}),
    (2, "checkpointing", {"expert": 2}),
    (2, "masked", {"expert": 2, "zero": 1}),
    (3, "plain", {}),
    (3, "bias", {"zero": 1}),
    (4, "plain", {"replicate": 2}),
    (4, "masked", {"expert": 2}),
    (4, "bias", {"expert": 4}),
    (4, "plain", {"expert": 2, "zero": 0}),
    (4, "bias", {"expert": 2, "replicate": 2, "zero": 2}),
    (4, "checkpointing", {"expert": 2}),
    (2, "plain", {"tensor": 2}),
    (2, "masked", {"tensor": 2}),
    (2, "muon", {"tensor": 2}),
    (2, "grouped", {"tensor": 2}),
    (2, "checkpointing", {"tensor": 2}),
    (4, "bias", {"tensor": 2}),
    (4, "plain", {"tensor": 2, "expert": 2}),
    (4, "masked", {"tensor": 2, "zero": 1}),
    (2, "plain", {"pipeline": 2, "pipeline_schedule": "gpipe"}),
    (2, "deep", {"pipeline": 2}),
    (2, "deep", {"pipeline": 2, "pipeline_schedule": "interleaved"}),
    (2, "dense", {"pipeline": 2}),
    (2, "muon", {"pipeline": 2}),
    (2, "uneven", {"pipeline": 2}),
    (3, "uneven", {"pipeline": 3}),
    (4, "deep", {"pipeline": 4}),
    (4, "deep", {"pipeline": 2}),
    (4, "deep", {"pipeline": 2, "tensor": 2}),
    (4, "deep bias", {"pipeline": 2, "zero": 1}),
    (4, "deep bias", {"pipeline": 2, "expert": 2}),
    (4, "deep bias", {"pipeline": 2, "expert": 2, "zero": 1, "pipeline_schedule": "interleaved"}),
    (4, "plain", {"pipeline": 2, "zero": 0, "pipeline_schedule": "gpipe"}),
    (4, "deep", {"pipeline": 2, "replicate": 2}),
    (8, "deep bias", {"pipeline": 2, "tensor": 2, "expert": 2}),
]


def name_of(variant: str, parallel: dict) -> str:
    """Return a folder's name."""
    return " ".join([variant, *(f"{key}={value}" for key, value in parallel.items())])


@pytest.fixture(scope="module")
def layouts(values, tmp_path_factory):
    """A function that returns the folder of all layouts of so many ranks."""
    folder, done = tmp_path_factory.mktemp("layouts"), set()

    def train(size: int) -> Path:
        if size not in done:
            cases = {name_of(v, p): case(values, v, p) for n, v, p in LAYOUTS if n == size}
            train_cases(cases, size, folder / str(size))
            done.add(size)
        return folder / str(size)

    return train


@pytest.mark.slow
@pytest.mark.parametrize(("size", "variant", "parallel"), LAYOUTS)
def test_every_layout_trains_what_one_process_trains(layouts, reference, size, variant, parallel):
    n_data = size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    apart = differences(layouts(size) / name_of(variant, parallel), reference(variant, n_data))
    assert is_equal(apart, variant), str(apart)


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_and_another_layout_goes_on(values, reference, tmp_path):
    """Four processes stop, two go on, then three, then one; 3 x 2 resume as undisturbed."""
    experts = {"expert": 2}
    train_cases({"a": case(values, "bias", experts), "b": case(values, "bias", experts)}, 4, tmp_path)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for size, stop, parallel in ((4, 1, experts), (2, 2, {"zero": 1}), (3, 3, {}), (2, 4, experts)):
        wide = changed(values, {"train.micro_batch_tokens": 192})
        spread = case(wide, "plain", parallel, limits={"max_steps": stop}, resume=stop > 1, folder="moved")
        assert train_cases({"moved": spread}, size, tmp_path) == {"moved": "max_steps"}
    run_training(
        RunConfig.from_mapping(changed(values, {"train.micro_batch_tokens": 192})), tmp_path / "moved", None, True
    )
    alone = tmp_path / "alone"
    run_training(RunConfig.from_mapping(changed(values, {"train.micro_batch_tokens": 192})), alone)
    mine, other = steps(tmp_path / "moved"), steps(alone)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(mine, other, strict=True)) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("order", ["1f1b", "interleaved"])
def test_a_resumed_pipeline_ends_with_the_bytes_of_an_undisturbed_one(values, tmp_path, order):
    """So does the same command."""
    parallel = {"pipeline": 2, "pipeline_schedule": order}
    cases = {
        "whole": case(values, "deep", parallel),
        "again": case(values, "deep", parallel),
        "half": case(values, "deep", parallel, limits={"max_steps": 3}, folder="resumed"),
        "resumed": case(values, "deep", parallel, resume=True),
    }
    train_cases(cases, 2, tmp_path)
    assert files(tmp_path / "whole") == files(tmp_path / "again") == files(tmp_path / "resumed")


@pytest.mark.slow
def test_a_pipeline_goes_on_from_other_layouts_and_they_from_it(values, tmp_path):
    """Two stages, one process, two stages of two ranks, four stages in two parts, two data ranks."""
    wide = changed(values, {"train.micro_batch_tokens": 192})
    interleaved = {"pipeline": 2, "pipeline_schedule": "interleaved"}
    for size, stop, parallel in ((2, 1, {"pipeline": 2}), (1, 2, {}), (4, 3, {"pipeline": 2}), (2, 4, interleaved)):
        case_of_layout = case(wide, "deep", parallel, limits={"max_steps": stop}, resume=stop > 1, folder="moved")
        assert train_cases({"moved": case_of_layout}, size, tmp_path) == {"moved": "max_steps"}
    train_cases({"moved": case(wide, "deep", {"zero": 1}, resume=True)}, 2, tmp_path)
    run_training(RunConfig.from_mapping(changed(wide, VARIANTS["deep"])), tmp_path / "alone")
    mine, other = steps(tmp_path / "moved"), steps(tmp_path / "alone")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(mine, other, strict=True)) < LIMITS["loss"]
    own, theirs = weights(tmp_path / "moved"), weights(tmp_path / "alone")
    assert max(float((own[name] - theirs[name]).abs().max()) for name in theirs) < LIMITS["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gathered", "sharded"])
def test_a_full_disk_of_one_rank_is_an_error_of_all_and_no_hang(values, tmp_path, kind):
    """Rank 0 gathers; of shards another rank's disk is full."""
    cases = tmp_path / "cases.json"
    settings = changed(values, {"checkpoint.format": kind})
    cases.write_text(json.dumps({"full": case(settings, spoil=f"full disk, {kind}", limits={"max_steps": 1})}))
    here = Path(__file__).resolve().parents[1] / "ranks.py"
    for status, output in finish(start(2, str(here), str(cases))):
        assert status == 0, output
        assert "stopped: step 1 could not be saved" in output
        assert "No space left on device" in output
    assert not list((tmp_path / "full" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(values, tmp_path):
    """The checkpoint is good, and the command ends as for one process; a resume goes on from it."""
    run_dir = tmp_path / "run"
    processes = in_the_middle(values, run_dir, save_every=0)
    processes[1].send_signal(signal.SIGTERM)
    (status, output), (other, _) = finish(processes)
    assert (status, other) == (143, 143), output
    assert f"SIGTERM: saved step {load_model(run_dir).step}" in output
    assert steps_so_far(run_dir)[-1]["step"] == load_model(run_dir).step


def in_the_middle(values: dict, run_dir: Path, save_every: int) -> list[subprocess.Popen]:
    """Start two ranks of a long run, and return them after some steps."""
    path = run_dir.with_suffix(".yaml")
    long = changed(values, {"train.sample_tokens": 0, "checkpoint.every_steps": save_every})
    long["schedule"] = {"stages": [{"until_tokens": 10**7, "seq_len": 16, "batch_tokens": 64}]}
    path.write_text(yaml.safe_dump(long))
    processes = start(2, "-m", "moe_gpt", "train", str(path), "--run-dir", str(run_dir))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(steps_so_far(run_dir)) < 4:
        time.sleep(0.1)
    return processes


def steps_so_far(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of the steps of a run that may have just begun."""
    return steps(run_dir) if (run_dir / "metrics.jsonl").is_file() else []


@pytest.mark.slow
def test_a_rank_that_loses_another_says_so_in_a_line(values, tmp_path):
    """With the newest checkpoint, at once, and with a status that makes torchrun start again."""
    run_dir = tmp_path / "run"
    processes = in_the_middle(values, run_dir, save_every=2)
    processes[1].kill()
    (status, output), _ = finish(processes, 30)
    assert status == 3, output
    assert "error: rank 0: another rank did not answer in step" in output
    assert "the newest checkpoint is" in output
    assert "Traceback" not in output


_LAST_COLLECTIVE = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from moe_gpt.config import RunConfig
from moe_gpt.distributed.process import join, leave

team = join(RunConfig.from_mapping({values}))
mesh = init_device_mesh("cpu", (team.size,))
for _ in range(20):
    parts = [torch.ones(1000) for _ in range(team.size)]
    for rank, part in enumerate(parts):
        dist.broadcast(part, group=mesh.get_group(), group_src=rank)
leave()
"""


@pytest.mark.slow
def test_a_process_may_end_right_after_a_collective(values):
    """Half of these pairs were aborted at their end, because a thread of gloo still had a tensor of Python."""
    pairs = [start(2, "-c", _LAST_COLLECTIVE.format(values=values)) for _ in range(6)]
    ended = [result for pair in pairs for result in finish(pair)]
    assert [status for status, _ in ended] == [0] * 12, ended


_AGREEMENT = """
import os, time
time.sleep(3 * (os.environ["RANK"] == "0"))  # the others find what is in the store already
from moe_gpt.config import RunConfig
from moe_gpt.distributed.process import join, leave

print(join(RunConfig.from_mapping({values})).from_main(lambda: "rank 0 is in attempt " + os.environ["ATTEMPT"]))
leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_ranks_that_torchrun_started_again_do_not_read_the_agreements_of_before(values, n_nodes):
    """With the store that torchrun shares with the ranks of all attempts; on several nodes they refuse it."""
    store = torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True)
    of_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": str(n_nodes)}
    for attempt in ("0", "1"):
        own = of_torchrun | {"TORCHELASTIC_RESTART_COUNT": attempt, "ATTEMPT": attempt}
        words = [sys.executable, "-c", _AGREEMENT.format(values=values)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ended = finish(
            [subprocess.Popen(words, env=variables(rank, 2, store.port) | own, **pipes) for rank in range(2)]
        )
        wanted = f"rank 0 is in attempt {attempt}"
        if attempt == "1" and n_nodes > 1:
            wanted = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        assert all(wanted in output for _, output in ended), ended
