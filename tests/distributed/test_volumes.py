"""What ranks send each other in a step, counted, against what the planner says."""

import copy
import json

import pytest
from ranks import train_cases

from moe_gpt.config import RunConfig
from moe_gpt.plan.communication import communication_section
from moe_gpt.plan.hardware import GPUS, Parallelism

M, T = 2048, 64
"""Tokens of a rank in a forward pass, and of a sequence."""
SIZES = {"n_layers": 4, "d_model": 128, "n_heads": 4, "head_dim": 16, "d_ff": 64, "n_experts": 8, "init_std": 0.02}
LAYOUTS = {
    "zero=0": {"all_reduce": ["gradient_all_reduce"]},
    "zero=1": {"send": ["gradient_reduce_scatter"], "broadcast": ["weight_all_gather"]},
    "zero=2": {"send": ["gradient_reduce_scatter"], "all_gather": ["weight_all_gather"]},
    "zero=3": {"send": ["gradient_reduce_scatter"], "all_gather": ["weight_all_gather"]},
    "expert=2": {
        "send": ["gradient_reduce_scatter"],
        "all_to_all": ["expert_all_to_all"],
        "all_gather": ["weight_all_gather"],
    },
    "tensor=2": {"all_reduce": ["tensor_all_reduce"]},
}
"""Of each layout: collectives, and the planner's kinds of traffic that they carry. On a CPU, each rank sends the others
the gradients that they add up. In ZeRO 1 it then broadcasts the weights that it has moved."""


@pytest.fixture(scope="module")
def runs(small_values, tmp_path_factory):
    """The folder of a run of one step with two micro-batches for each layout, and their configs."""
    folder, cases, configs = tmp_path_factory.mktemp("volumes"), {}, {}
    for layout in LAYOUTS:
        values = copy.deepcopy(small_values)
        values["model"] |= SIZES
        n_data = 1 if layout == "tensor=2" else 2
        values["schedule"] = {"stages": [{"until_tokens": 16_384, "seq_len": T, "batch_tokens": 2 * n_data * M}]}
        values["train"] |= {"micro_batch_tokens": M, "sample_tokens": 0, "record_tokens": 0, "record_every_steps": 0}
        key, number = layout.split("=")
        values["parallel"] = {key: int(number)}
        cases[layout] = {"values": values, "limits": {"max_steps": 1}, "volumes": True}
        configs[layout] = RunConfig.from_mapping(values | {"model": values["model"] | {"vocab_size": 400}})
    train_cases(cases, 2, folder)
    return folder, configs


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_the_planner_says(runs, layout):
    """Within a hundredth: besides what the planner counts, ranks agree on a few numbers."""
    folder, configs = runs
    sent, own = json.loads((folder / layout / "volumes.json").read_text()), configs[layout].parallel
    spread = Parallelism(2, own.tensor, own.pipeline, own.expert, own.zero)
    planned = communication_section(configs[layout], spread, GPUS["h100"], micro_batch_sequences=M // T)
    for collective, kinds in LAYOUTS[layout].items():
        in_float32 = 2 * sum(planned[f"{kind}_bytes"] for kind in kinds)  # the planner counts numbers of two bytes
        assert sent[collective] == pytest.approx(in_float32, rel=0.01), collective
