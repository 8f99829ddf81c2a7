"""GPUs by datasheet, by a user's figures and measured; layouts and what they refuse."""

import dataclasses
import time

import psutil
import pytest
import torch

from moe_gpt.config import ModelConfig
from moe_gpt.errors import ConfigError, InputError
from moe_gpt.plan.hardware import GPUS, Gpu, Parallelism, find_gpu, gpu_of, gpu_section, parse_gpu, read_gpus

OWN = "name=mine,memory=96e9,flops=4e14,bandwidth=2e12,link=4e11,network=5e10"
MODEL = ModelConfig(vocab_size=10, n_layers=6, n_heads=4, n_experts=8)


@pytest.mark.parametrize(
    ("name", "memory", "flops", "bandwidth"),
    [
        ("a100-40gb", 40e9, 312e12, 1.555e12),
        ("a100-80gb", 80e9, 312e12, 2.039e12),
        ("h100", 80e9, 989.4e12, 3.35e12),
        ("h200", 141e9, 989.4e12, 4.8e12),
        ("b200", 180e9, 2250e12, 8e12),
        ("rtx-4090", 24e9, 165.2e12, 1.008e12),
    ],
)
def test_gpus_are_those_of_the_datasheets(name, memory, flops, bandwidth):
    """Memory, dense bf16 speed and bandwidth of each datasheet, which is named."""
    gpu = find_gpu(name)
    assert (gpu.memory_bytes, gpu.bf16_flops, gpu.bandwidth) == (memory, flops, bandwidth)
    assert gpu.name == name
    assert "NVIDIA" in gpu.source


def test_links_are_one_direction_and_faster_than_networks():
    """NVLink's 600, 900 and 1,800 GB/s count both directions; ours is one."""
    assert [GPUS[name].link for name in ("a100-80gb", "h100", "b200")] == [300e9, 450e9, 900e9]
    assert all(gpu.network < gpu.link < gpu.bandwidth for gpu in GPUS.values())


def test_find_gpu_lists_all_where_there_is_none():
    """An unknown name is refused with every name there is."""
    with pytest.raises(InputError, match="no GPU 'a1000'.*a100-40gb, a100-80gb, h100, h200, b200, rtx-4090, cpu"):
        find_gpu("a1000")


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("h100-80gb", "h100"), ("H100_80GB", "h100"), ("A100-80GB", "a100-80gb"), ("rtx 4090", "rtx-4090")],
)
def test_gpus_are_found_as_people_spell_them(spelled, name):
    """In capitals, without dashes, with the memory after the name."""
    assert find_gpu(spelled) is GPUS[name]


@pytest.mark.parametrize(
    ("described", "name"),
    [
        ("cuda (NVIDIA H200)", "h200"),
        ("cuda:1 (NVIDIA H100 80GB HBM3)", "h100"),
        ("cuda (NVIDIA A100-SXM4-40GB)", "a100-40gb"),
        ("cuda (NVIDIA A100-SXM4-80GB)", "a100-80gb"),
        ("cuda (NVIDIA GeForce RTX 4090)", "rtx-4090"),
        ("cuda (NVIDIA H100 PCIe)", None),
        ("cuda (NVIDIA A100 80GB PCIe)", None),
        ("cuda (NVIDIA GH200 480GB)", None),
        ("cuda (NVIDIA GeForce RTX 4090 Laptop GPU)", None),
        ("cpu (2 threads)", None),
    ],
)
def test_gpus_are_found_as_their_driver_calls_them(described, name):
    """Versions with other figures are not in the table."""
    assert gpu_of(described) is (GPUS[name] if name else None)


@pytest.mark.parametrize("name", ["h100-96gb", "a100", "h100-80"])
def test_gpu_of_another_memory_is_another_gpu(name):
    """The table has none of these, or two."""
    with pytest.raises(InputError, match="there is no GPU"):
        find_gpu(name)


@pytest.mark.parametrize(("load", "is_busy"), [(0.0, False), (1.0, False), (1.1, True), (26.0, True)])
def test_busy_machine_is_noticed(monkeypatch, load, is_busy):
    """More than one process for two cores: the plan says so in a note, where it measures."""
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu = find_gpu("cpu")
    assert (cpu.cores, cpu.load, cpu.is_busy) == (2, load, is_busy)
    assert any("busy" in note for note in gpu_section(cpu).notes) == is_busy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bandwidth": "fast"}, "mine.bandwidth must be a number above 0, got 'fast'"),
        ({"link": -1}, "mine.link must be a number above 0, got -1"),
        ({"networks": 5e10}, "mine.networks is not a known key; did you mean network?"),
        ({"source": None}, "mine.source must be text"),
        ({"per_node": 0}, r"mine.per_node must be a whole number from 1 to 2\^63 - 1, got 0"),
    ],
)
def test_malformed_table_of_gpus_is_refused(changes, message):
    """The error names the GPU and the figure, and a good entry stays good."""
    good = {
        "memory_bytes": "96e9",
        "bf16_flops": 4e14,
        "bandwidth": 2e12,
        "link": 4e11,
        "network": 5e10,
        "source": "me",
    }
    assert read_gpus({"mine": good})["mine"] == Gpu("mine", 96e9, 4e14, 2e12, 4e11, 5e10, "me")
    with pytest.raises(ConfigError, match=message):
        read_gpus({"mine": good | changes})
    with pytest.raises(ConfigError, match="mine.memory_bytes is required"):
        read_gpus({"mine": {key: value for key, value in good.items() if key != "memory_bytes"}})


def test_parse_gpu_reads_a_users_figures():
    """Every figure lands in its field; find_gpu takes the description, too."""
    assert parse_gpu(OWN) == Gpu("mine", 96e9, 4e14, 2e12, 4e11, 5e10, "given by the user")
    assert find_gpu(f" {OWN}, per_node=4".replace(",", " , ")).per_node == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory=96e9", "memory=0", "; memory must be a number above 0, got '0'"),
        ("flops=4e14", "flops=-4e14", "; flops must be a number above 0, got '-4e14'"),
        ("link=4e11", "link=fast", "; link must be a number above 0, got 'fast'"),
        ("link=4e11", "link=inf", "; link must be a number above 0, got 'inf'"),
        (",network=5e10", "", "; network is required"),
        ("memory=96e9,", "", "; memory is required"),
        ("bandwidth=2e12", "band=2e12", "; band is not a known key; did you mean bandwidth?"),
        ("bandwidth=2e12", "link=2e12", "; link is given twice"),
        ("bandwidth=2e12", "bandwidth", "; bandwidth must be a number above 0, got ''"),
        ("name=mine", "per_node=2.5", "; per_node must be a whole number from 1 to 2^63 - 1, got '2.5'"),
    ],
)
def test_parse_gpu_names_the_key_that_is_wrong(old, new, message):
    """Every wrong figure is refused by its key, with its value, on one line."""
    with pytest.raises(InputError) as error:
        parse_gpu(OWN.replace(old, new))
    assert message in str(error.value).replace(": ", "; ")
    assert "\n" not in str(error.value)


def test_find_gpu_measures_the_cpu_within_a_second():
    """``cpu`` has this machine's memory and a plausible speed, and says how they were measured."""
    started = time.perf_counter()
    cpu = find_gpu("cpu")
    assert time.perf_counter() - started < 3  # a second where nothing else runs
    assert 1e8 < cpu.bf16_flops < 1e14
    assert 1e8 < cpu.memory_bytes < 1e14
    assert "measured" in cpu.source


def test_parallelism_leaves_spares():
    """25,000 GPUs are 208 x 120 and leave 40 spares."""
    layout = Parallelism(25_000, tensor=8, pipeline=15)
    assert (layout.model_gpus, layout.data_parallel, layout.used, layout.spares) == (120, 208, 24_960, 40)
    assert layout.batch_ranks == 208


def test_parallelism_experts_are_part_of_data_parallelism():
    """With experts over 4 GPUs there are a quarter of their copies, and each GPU still reads text of its own."""
    layout = Parallelism(64, tensor=2, pipeline=2, expert=4)
    assert (layout.model_gpus, layout.data_parallel, layout.batch_ranks) == (16, 4, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_gpus": 7}, "n_gpus must be at least tensor x pipeline x expert = 2 x 2 x 2 = 8, got 7"),
        ({"tensor": 0}, "tensor must be a whole number from 1 to 2^63 - 1, got 0"),
        ({"pipeline": -1, "expert": 1.5}, "pipeline must be a whole number from 1 to 2^63 - 1, got -1\nexpert must"),
        ({"n_gpus": True}, "n_gpus must be a whole number from 1 to 2^63 - 1, got True"),
        ({"zero": 4}, "zero must be one of 0, 1, 2, 3, fsdp, got 4"),
    ],
)
def test_parallelism_refuses_what_cannot_be(changes, message):
    """A line for each value that is wrong."""
    with pytest.raises(InputError) as error:
        dataclasses.replace(Parallelism(64, tensor=2, pipeline=2, expert=2), **changes)
    assert message in str(error.value)


def test_parallelism_check_of_serving_lets_stages_differ():
    """Six layers go over four stages when serving, not in training, and never over seven; heads divide in both."""
    Parallelism(64, tensor=2, pipeline=4).check(MODEL, serving=True)
    with pytest.raises(InputError, match="^when serving, model.n_layers=6 must be at least pipeline, got pipeline=7$"):
        Parallelism(64, pipeline=7).check(MODEL, serving=True)
    with pytest.raises(InputError, match="^when serving, model.n_heads=4 must be a multiple of tensor, got tensor=3;"):
        Parallelism(64, tensor=3).check(MODEL, serving=True)


@pytest.mark.parametrize(
    ("layout", "lines"),
    [
        ({"tensor": 3}, ["model.n_heads=4 must be a multiple of tensor, got tensor=3; choose one of 1, 2, 4"]),
        (
            {"pipeline": 4},
            ["model.n_layers=6 must be a multiple of pipeline, got pipeline=4; choose one of 1, 2, 3, 6"],
        ),
        ({"expert": 3}, ["model.n_experts=8 must be a multiple of expert, got expert=3; choose one of 1, 2, 4, 8"]),
        ({"tensor": 2, "pipeline": 3, "expert": 8}, []),
    ],
)
def test_parallelism_check_names_what_a_model_does_not_divide(layout, lines):
    """Heads by tensor, layers by pipeline, experts by expert size; one line each, with what would do."""
    if not lines:
        return Parallelism(64, **layout).check(MODEL)
    with pytest.raises(InputError) as error:
        Parallelism(64, **layout).check(MODEL)
    assert str(error.value).splitlines() == lines
    return None
