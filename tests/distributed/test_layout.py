"""Which layouts there are, and what the variables of a launch say."""

from __future__ import annotations

import dataclasses

import pytest
from ranks import free_port

from moe_gpt.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from moe_gpt.distributed.layout import Layout, expert_dim, layers_of_stages, plan_layout
from moe_gpt.distributed.process import ALONE, SOLO, join, read_launch
from moe_gpt.errors import InputError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def config(parallel: dict, **model) -> RunConfig:
    return RunConfig(model=ModelConfig(**model), parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "world", "layout"),
    [
        ({}, 1, Layout(1, 1, 1, 3)),
        ({}, 4, Layout(4, 1, 1, 3)),
        ({"data": 4, "zero": 0}, 4, Layout(4, 4, 1, 0)),
        ({"replicate": 2, "expert": 2, "zero": 2}, 4, Layout(4, 2, 2, 2)),
        ({"expert": 4, "zero": 0}, 4, Layout(4, 4, 4, 0)),
        ({"zero": 1}, 7, Layout(7, 1, 1, 1)),
        ({"expert": 3}, 3, Layout(3, 1, 3, 3)),
        ({"tensor": 2, "expert": 2}, 8, Layout(4, 1, 2, 3, 2)),
        ({"pipeline": 2, "expert": 2, "tensor": 2}, 8, Layout(2, 1, 2, 3, 2, 2)),
    ],
)
def test_layouts_that_fit(parallel, world, layout):
    assert plan_layout(config(parallel, n_experts=8), world) == layout


@pytest.mark.parametrize(
    ("parallel", "model", "world", "text"),
    [
        (
            {"data": 4},
            {},
            2,
            "parallel.data=4 x tensor=1 x pipeline=1 needs 4 processes, got 2; start torchrun with --nproc-per-node 4",
        ),
        ({"expert": 2}, {}, 1, "got 2 for 1; it may be 1; start torchrun with --nproc-per-node 2"),
        ({"expert": 2}, {}, 5, "got 2 for 5; it may be 1, 5"),
        ({"replicate": 3}, {}, 4, "parallel.replicate must divide the number of data ranks, got 3 for 4"),
        ({"replicate": 2, "expert": 4}, {}, 4, "data ranks / replicate=2, got 4 for 2; it may be 1, 2"),
        ({"expert": 8}, {"n_experts": 4}, 8, "parallel.expert=8 does not fit model.n_experts=4"),
        ({"expert": 3}, {"n_experts": 4}, 3, "it may be 1 (3 processes)"),
        ({"tensor": 3}, {}, 4, "tensor=3 x pipeline=1 needs a multiple of 3 processes, got 4"),
        ({"tensor": 3}, {"n_heads": 2}, 3, "parallel.tensor=3 must divide model.n_heads=2"),
        ({"tensor": 4}, {"n_heads": 4, "n_kv_heads": 2}, 4, "n_kv_heads=2; it may be 1, 2"),
        ({}, {"capacity_factor": 1.0}, 2, "model.capacity_factor must be null"),
        (
            {"pipeline": 4},
            {"n_layers": 6, "attention_sharing": 2},
            4,
            "parallel.pipeline=4 with pipeline_schedule=1f1b makes 4 stages, but only 3 can be cut from "
            "model.n_layers=6 with attention_sharing=2; pipeline may be at most 3 (4 processes)",
        ),
        ({"pipeline": 3, "pipeline_schedule": "interleaved"}, {"n_layers": 4}, 3, "6 stages, but only 4 can be cut"),
        ({"pipeline": 2, "pipeline_schedule": "interleaved"}, {"n_layers": 1}, 2, "pipeline may be at most 1"),
        ({}, {"n_experts": 16, "d_model": 128, "d_ff": 256}, 120, "cannot be cut into 120 parts"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_in_one_line(parallel, model, world, text):
    """With the numbers, and with what would fit."""
    with pytest.raises(InputError) as refused:
        plan_layout(config(parallel, **model), world)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("parallel", "model", "layers"),
    [
        ({"pipeline": 2}, {"n_layers": 4}, [[0, 1], [2, 3]]),
        ({"pipeline": 3}, {"n_layers": 4}, [[0, 1], [2], [3]]),
        ({"pipeline": 2}, {"n_layers": 6, "attention_sharing": 2}, [[0, 1, 2, 3], [4, 5]]),
        ({"pipeline": 2, "pipeline_schedule": "interleaved"}, {"n_layers": 5}, [[0, 1], [2], [3], [4]]),
    ],
)
def test_layers_that_share_an_attention_stay_on_one_stage(parallel, model, layers):
    """Every layer is on one stage, and none is empty."""
    assert [list(stage) for stage in layers_of_stages(config(parallel, **model))] == layers


@pytest.mark.parametrize("axis", ["expert", "tensor"])
def test_settings_that_need_whole_tensors(axis):
    """They go with one process, and with a pipeline."""
    for section in ({"optimizer": OptimizerConfig(state_type="int8")}, {"train": TrainConfig(compile=True)}):
        several = dataclasses.replace(config({axis: 2}), **section)
        assert plan_layout(dataclasses.replace(several, parallel=ParallelConfig()), 1) == Layout()
        assert plan_layout(dataclasses.replace(several, parallel=ParallelConfig(pipeline=2)), 2).pipeline == 2
        with pytest.raises(InputError):
            plan_layout(several, 2)


@pytest.mark.parametrize(
    ("parallel", "model", "world", "dim"),
    [
        ({}, {"n_experts": 8}, 4, 0),
        ({}, {"n_experts": 8, "d_model": 96, "d_ff": 96}, 3, 1),
        ({}, {"n_experts": 8, "d_model": 128, "d_ff": 256}, 3, 0),  # 3, 3, 2
        ({"expert": 2}, {"n_experts": 8}, 4, 1),
        ({"expert": 2}, {"n_experts": 8, "d_model": 128, "d_ff": 256}, 6, None),
    ],
)
def test_stacked_experts_are_cut_evenly_where_they_can_be(parallel, model, world, dim):
    """Unevenly only between whole experts, and never where they are spread already."""
    found = config(parallel, **model)
    layout = Layout(world, 1, found.parallel.expert)
    assert expert_dim(found, layout) == dim


def test_a_launch_is_read_from_torchruns_variables():
    assert read_launch(TORCHRUN) == (1, 4, 1, "localhost", 29500)
    assert read_launch({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "MASTER_ADDR": "node01"}) is ALONE


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"WORLD_SIZE": None, "MASTER_ADDR": None},
            "RANK=1 MASTER_PORT=29500 is set in the environment without WORLD_SIZE",
        ),
        ({"RANK": "5"}, "RANK must be below WORLD_SIZE=4, got 5"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment must be a whole number, got 'two'"),
    ],
)
def test_half_a_launch_is_refused(changes, text):
    with pytest.raises(InputError) as refused:
        read_launch({name: value for name, value in (TORCHRUN | changes).items() if value is not None})
    assert text in str(refused.value)


def test_a_process_alone_has_no_group(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert join(config({})) is SOLO
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert join(config({})) is SOLO


@pytest.mark.slow
def test_ranks_that_do_not_come_are_named(monkeypatch, capsys):
    """Within the time that is given, with the variables."""
    port = free_port()
    launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port} did not meet"):
        join(config({"timeout_seconds": 1}))
    assert f"rank 0 of 2 waits for 1 more process at 127.0.0.1:{port}" in capsys.readouterr().err
