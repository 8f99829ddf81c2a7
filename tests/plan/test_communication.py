"""What a step sends, by hand, and the pipeline's idle share."""

import pytest

from moe_gpt.config import ModelConfig, RunConfig, ScheduleConfig, StageConfig
from moe_gpt.config.yaml import load_run_config
from moe_gpt.plan.communication import bubble, communication_section
from moe_gpt.plan.hardware import GPUS, Parallelism
from moe_gpt.plan.memory import stage_parameters

MODEL = ModelConfig(
    vocab_size=40, n_layers=4, d_model=8, n_heads=4, head_dim=2, d_ff=6, n_experts=4, top_k=2, max_seq_len=32
)
RUN = RunConfig(
    model=MODEL, schedule=ScheduleConfig(stages=(StageConfig(until_tokens=6400, seq_len=16, batch_tokens=256),))
)
H100 = GPUS["h100"]
HIDDEN = 2 * 16 * 8
"""Bytes of one micro-batch's residual stream."""


def section(n_gpus: int, recompute: bool = False, **layout: object):
    return communication_section(RUN, Parallelism(n_gpus, **layout), H100, recompute)


@pytest.mark.parametrize(
    ("pipeline", "micro_batches", "share"), [(1, 8, 0), (4, 1, 0.75), (4, 12, 0.2), (15, 36, 0.28)]
)
def test_bubble_is_the_idle_share(pipeline, micro_batches, share):
    """The bubble is (p - 1) / (m + p - 1): nothing for one stage, all but a p-th for one micro-batch."""
    assert bubble(pipeline, micro_batches) == pytest.approx(share)


def test_one_gpu_sends_nothing():
    """All kinds are there, and all are zero."""
    found = section(1)
    assert found["total_bytes"] == found["total_seconds"] == found["pipeline_bubble"] == 0
    assert found["micro_batches"] == 16


def test_tensor_all_reduces_are_narayanans():
    """Narayanan et al., section 3.2: 8 b s h (t - 1) / t numbers a layer and micro-batch; half more to recompute.

    The embedding's output and the gradient of the last hidden states are two of the four of another layer.
    """
    numbers = 8 * 16 * 8 * (4 - 1) / 4
    assert section(4, tensor=4)["tensor_all_reduce_bytes"] == 2 * numbers * (4 + 0.5) * 16
    assert section(4, True, tensor=4)["tensor_all_reduce_bytes"] == 2 * numbers * (1.5 * 4 + 0.5) * 16
    assert section(8, pipeline=2, tensor=4)["tensor_all_reduce_bytes"] == 2 * numbers * 2 * 16


def test_expert_all_to_alls_send_what_stays_not_at_home():
    """Four a layer, each K copies of a token of which 1 - 1/e leave the GPU."""
    assert section(4, expert=4)["expert_all_to_all_bytes"] == 4 * 4 * (16 / 4) * 2 * HIDDEN * 3 / 4


def test_pipeline_sends_twice_a_micro_batch():
    """The residual stream forward, its gradient backward, each of t GPUs a part of it."""
    assert section(4, pipeline=4)["pipeline_sends_bytes"] == 2 * 16 * HIDDEN
    assert section(4, pipeline=2, tensor=2)["pipeline_sends_bytes"] == 2 * 16 * HIDDEN / 2


def test_data_parallel_volumes_are_zeros():
    """ZeRO, section 7: with one micro-batch stages 0, 1 and 2 send the parameters twice, stage 3 three times.

    Embedding and output (40 x 8 each) and the last norm are kept between the forward and the backward pass.
    """
    parameters = sum(stage_parameters(MODEL, Parallelism(16), 0)[:2])
    passed_on, kept = 2 * parameters * 15 / 16, 2 * (2 * 40 * 8 + 8) * 15 / 16
    volumes = [section(16, zero=zero)["total_bytes"] for zero in (0, 1, 2, 3, "fsdp")]
    assert volumes == pytest.approx([2 * passed_on] * 3 + [3 * passed_on - kept] * 2)


def test_split_gradients_and_weights_travel_with_every_micro_batch():
    """With four micro-batches stage 2 scatters four times and gathers once, FSDP gathers layers eight times."""
    parameters = sum(stage_parameters(MODEL, Parallelism(4), 0)[:2])
    passed_on, kept = 2 * parameters * 3 / 4, 2 * (2 * 40 * 8 + 8) * 3 / 4
    for zero, scatters, gathered in (
        (1, 1, passed_on),
        (2, 4, passed_on),
        ("fsdp", 4, 8 * passed_on - 4 * kept),
    ):
        found = section(4, zero=zero)
        assert found["gradient_reduce_scatter_bytes"] == pytest.approx(scatters * passed_on)
        assert found["weight_all_gather_bytes"] == pytest.approx(gathered)


def test_times_take_the_slowest_link():
    """Eight GPUs are one node and use its links; sixteen go over the network."""
    node, two = section(8), section(16)
    assert node["weight_all_gather_seconds"] == pytest.approx(node["weight_all_gather_bytes"] / 450e9)
    assert two["weight_all_gather_seconds"] == pytest.approx(two["weight_all_gather_bytes"] / 50e9)
    kinds = ("tensor_all_reduce", "expert_all_to_all", "pipeline_sends", "gradient_reduce_scatter", "weight_all_gather")
    assert two["total_seconds"] == pytest.approx(sum(two[f"{kind}_seconds"] for kind in kinds))


def test_notes_say_who_idles():
    """A batch of fewer micro-batches than ranks leaves ranks idle; one that does not divide makes some wait."""
    assert "16 micro-batches for 20 ranks" in section(20).notes[-1]
    assert "16 micro-batches do not divide by 5 ranks. Some ranks compute 4" in section(5).notes[-1]
    assert len(section(8).notes) == 1


def test_communication_of_the_reported_system():
    """36 micro-batches on 15 stages idle 28 % of the time: 60 M tokens in 7,324 sequences over 208 ranks."""
    gpt4 = load_run_config("gpt4.yaml")
    found = communication_section(gpt4, Parallelism(25_000, 8, 15), GPUS["a100-80gb"], recompute=True)
    assert found["micro_batches"] == 36
    assert found["pipeline_bubble"] == pytest.approx(14 / 50)
    assert found["compute_seconds_at_peak"] == pytest.approx(60e6 * 1.8e12 / (24_960 * 312e12), rel=0.01)
