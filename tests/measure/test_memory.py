"""What this project itself needs, against what autograd keeps, a process takes, and a checkpoint has on disk."""

import dataclasses
import functools
import platform

import pytest
import torch
from small_runs import run_training
from torch.autograd.graph import saved_tensors_hooks

from moe_gpt.bench.contenders import SHAPES, Ours, Workload, dense_twin, workload_of
from moe_gpt.bench.rounds import take_turns
from moe_gpt.config import ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, StageConfig, TrainConfig
from moe_gpt.config.yaml import load_run_config
from moe_gpt.measure.memory import kept_activation_bytes, predict_training_memory_cpu
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.plan.hardware import Parallelism, find_gpu
from moe_gpt.plan.memory import memory_section
from moe_gpt.training.saving.size import checkpoint_bytes

MODEL = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, head_dim=16, d_ff=48, n_experts=4, max_seq_len=2048
)


def bytes_that_autograd_keeps(config: ModelConfig, n_sequences: int, seq_len: int, masking: bool) -> int:
    """Return the size of all storages that a forward pass saves, weights left out."""
    torch.manual_seed(0)
    model, storages = MoEGPT(config), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(64, (n_sequences, seq_len))
    document_ids = torch.zeros_like(tokens) if masking else None
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model.cross_entropy(tokens, tokens.clone(), document_ids)  # its graph must live while we look
    assert held[0].total > 0
    return sum(storages.values())


@pytest.mark.parametrize(
    ("changes", "shape", "masking"),
    [
        ({}, (4, 100), False),
        ({"n_kv_heads": 2}, (4, 100), False),
        ({"n_kv_heads": 4}, (4, 128), False),
        ({"n_experts": 1, "top_k": 1}, (4, 128), False),
        ({"tie_embeddings": True, "attention_sharing": 2, "balance": "bias"}, (4, 64), False),
        ({"n_experts": 16, "top_k": 3}, (4, 256), False),
        ({}, (1, 1500), False),
        ({"n_kv_heads": 2}, (2, 1500), False),
        ({}, (4, 100), True),
    ],
)
def test_kept_activation_bytes_are_what_autograd_keeps(changes, shape, masking):
    """To a thousandth, on every path that a CPU takes."""
    config = dataclasses.replace(MODEL, **changes)
    kept = kept_activation_bytes(config, *shape, keeps_documents_apart=masking)
    found = bytes_that_autograd_keeps(config, *shape, masking)
    assert kept.layer * config.n_layers + kept.outside == pytest.approx(found, rel=1e-3)


def run_of(workload: Workload) -> RunConfig:
    """Return the run whose steps a benchmark's workload takes."""
    stage = StageConfig(
        seq_len=workload.seq_len, batch_tokens=workload.batch_tokens, until_tokens=100 * workload.batch_tokens
    )
    train = TrainConfig(
        micro_batch_tokens=workload.micro_batch_tokens, activation_checkpointing=workload.activation_checkpointing
    )
    return RunConfig(model=workload.model, schedule=ScheduleConfig(stages=(stage,)), train=train)


def workload(name: str, **changes: object) -> Workload:
    """Return a shape of docs/benchmarks.md, or tiny, as ``scripts/bench.py train`` runs it."""
    if name == "tiny":
        return workload_of(load_run_config("tiny.yaml"), torch.device("cpu"), "fp32")
    model, n_sequences, seq_len = SHAPES[name[0]]
    model = dense_twin(model) if name.endswith("dense") else model
    return Workload(model, n_sequences, seq_len, "cpu", "fp32", n_sequences * seq_len, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "gigabytes"),
    [
        ("tiny", {}, 0.46),
        ("S", {}, 1.52),
        ("S", {"activation_checkpointing": True}, 1.06),
        ("M", {}, 4.94),
        ("S dense", {}, 1.20),
        ("M dense", {}, 2.89),
    ],
)
def test_predicted_memory_is_within_15_percent_of_what_was_measured(name, changes, gigabytes):
    """What scripts/bench.py train measured on an Intel CPU (docs/benchmarks.md)."""
    assert predict_training_memory_cpu(run_of(workload(name, **changes))) / 1e9 == pytest.approx(gigabytes, rel=0.15)


def make_step(of: Workload, name: str):
    """Return a training step (importable by another process)."""
    return Ours(of).step


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="measured by /proc, with glibc's heap")
@pytest.mark.parametrize("name", ["tiny", "S"])
def test_predicted_memory_is_within_15_percent_of_a_measurement_now(name):
    """As scripts/bench.py train measures it: seven steps in a process of their own."""
    turns = take_turns(
        ["moe_gpt"], functools.partial(make_step, workload(name)), rounds=1, turns=2, warmup=5, at_once=True
    )
    predicted = predict_training_memory_cpu(run_of(workload(name)))
    assert predicted == pytest.approx(turns["moe_gpt"].peak_memory_bytes, rel=0.15)


def test_predicted_memory_takes_the_worst_stage_and_no_more_than_its_batch():
    """A larger micro-batch than the batch changes nothing; a smaller one needs less."""
    sizes = [
        predict_training_memory_cpu(dataclasses.replace(run_of(workload("S")), train=TrainConfig(micro_batch_tokens=n)))
        for n in (1024, 4096, 16_384)
    ]
    assert sizes[0] < sizes[1] == sizes[2]


def test_memory_section_of_a_cpu_is_the_prediction():
    """One ``cpu`` is this project's own training: 4, 4 and 8 bytes a parameter, and what is predicted beyond."""
    run = run_of(workload("S"))
    section = memory_section(run, Parallelism(1), find_gpu("cpu"), recompute=False)
    assert section["total"] == predict_training_memory_cpu(run)
    assert section["total"] == sum(section[part] for part in ("weights", "gradients", "optimizer", "activations"))


@pytest.mark.parametrize(
    ("changes", "optimizer"),
    [
        ({}, {"state_type": "bfloat16"}),
        ({"balance": "bias", "tie_embeddings": True}, {}),
        ({"n_experts": 1, "top_k": 1}, {"name": "muon", "state_type": "int8"}),
    ],
)
def test_checkpoint_bytes_are_exact(small_config, tmp_path, changes, optimizer):
    """Both large files of a real checkpoint have just the bytes that were computed, headers included."""
    config = dataclasses.replace(
        small_config,
        model=dataclasses.replace(small_config.model, **changes),
        optimizer=OptimizerConfig(**optimizer),
    )
    run, _ = run_training(config, tmp_path / "run", max_steps=1)
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    sizes = tuple((folder / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    assert checkpoint_bytes(run.config) == sizes
    assert checkpoint_bytes(run.config).total == sum(sizes)
