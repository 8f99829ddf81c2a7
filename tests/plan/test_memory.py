"""Memory of one GPU: ZeRO's and Korthikanti's figures, layouts by hand, and what is advised."""

import dataclasses

import pytest

from moe_gpt.config import ModelConfig, RunConfig, ScheduleConfig, StageConfig
from moe_gpt.config.yaml import load_run_config
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.hardware import GPUS, Parallelism, parse_gpu
from moe_gpt.plan.memory import (
    FLOAT32,
    MIXED_PRECISION,
    GpuMemory,
    TrainingLayout,
    gpu_memory,
    layer_activation_bytes,
    memory_section,
    stage_parameters,
    zero_bytes,
)

MODEL = ModelConfig(
    vocab_size=40, n_layers=4, d_model=8, n_heads=4, n_kv_heads=2, head_dim=2, d_ff=6, n_experts=4, max_seq_len=32
)
COUNTS = count_parameters(MODEL)
RUN = RunConfig(
    model=MODEL,
    schedule=ScheduleConfig(stages=(StageConfig(until_tokens=6400, seq_len=16, batch_tokens=[32, 256]),)),
)


@pytest.fixture(scope="module")
def gpt4() -> RunConfig:
    """The reported system."""
    return load_run_config("gpt4.yaml")


def layout_of(**changes: object) -> TrainingLayout:
    spread = Parallelism(8, **{k: changes.pop(k) for k in ("tensor", "pipeline", "expert", "zero") if k in changes})
    values = {"recompute": False, "micro_batch_sequences": 1, "seq_len": 16, "batch_tokens": 256}
    return TrainingLayout(**({"parallelism": spread} | values | changes))


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88), ("fsdp", 1.88)])
def test_zero_bytes_are_those_of_the_paper(zero, gigabytes):
    """ZeRO, arXiv 1910.02054, figure 1: 7.5e9 parameters, N_d = 64, K = 12."""
    assert sum(zero_bytes(7.5e9, 64, Parallelism(1, zero=zero).zero_level)) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("parameters", "ranks", "row"),
    [
        (7.5e9, 1, (120, 120, 120)),
        (7.5e9, 4, (52.5, 41.3, 30)),
        (7.5e9, 16, (35.6, 21.6, 7.5)),
        (7.5e9, 1024, (30.1, 15.1, 0.12)),
        (128e9, 64, (536, 284, 32)),
        (1e12, 1024, (4011, 2013, 15.6)),
    ],
)
def test_zero_bytes_are_those_of_the_papers_table(parameters, ranks, row):
    """ZeRO, arXiv 1910.02054, table 1: stages 1, 2 and 3 in GB, to the digits printed."""
    found = [sum(zero_bytes(parameters, ranks, zero)) / 1e9 for zero in (1, 2, 3)]
    assert found == pytest.approx(row, rel=0.006, abs=0.05)


def test_zero_bytes_of_float32_training_are_sixteen():
    """This project's own: 4 of weights, 4 of gradients, 8 of moments."""
    assert zero_bytes(10, 1, 1, FLOAT32) == (40, 40, 80)


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_stage_parameters_are_all_there_are(pipeline):
    """Without tensor parallelism the stages' parameters add up to the model's."""
    layout = Parallelism(4, pipeline=pipeline)
    stages = [stage_parameters(MODEL, layout, stage) for stage in range(pipeline)]
    assert sum(stage.shared + stage.experts for stage in stages) == COUNTS.total


def test_stage_parameters_by_hand():
    """Two of four layers on tensor 4, expert 2: heads by 4, a key-value head each, experts by 8, routers whole.

    Attention 2 · 8 · 8 / 4 + 2 · 8 · 2 · 1, router 4 · 8 and norms 16 each; embedding 40 · 8 / 4 on the first stage,
    output the same and the norm of 8 on the last; 4 · 3 · 8 · 6 / 8 of experts in each layer.
    """
    layout = Parallelism(16, tensor=4, pipeline=2, expert=2)
    layer = 32 + 32 + 32 + 16
    assert stage_parameters(MODEL, layout, 0)[:2] == (2 * layer + 80, 2 * 72)
    assert stage_parameters(MODEL, layout, 1)[:2] == (2 * layer + 80 + 8, 2 * 72)


@pytest.mark.parametrize(("pipeline", "names"), [(1, []), (2, ["first", "last"]), (4, ["first", "middle", "last"])])
def test_each_kind_of_stage_is_told_apart(pipeline, names):
    """A pipeline of two stages has none in the middle."""
    spread = Parallelism(4, pipeline=pipeline)
    found = memory_section(RUN, spread, GPUS["a100-80gb"], recompute=False).values
    numbers = {"first": 0, "middle": (pipeline - 1) // 2, "last": pipeline - 1}
    layout = layout_of(parallelism=spread, per_parameter=MIXED_PRECISION)
    wanted = {f"{name}_stage": gpu_memory(MODEL, layout, numbers[name]).total for name in names}
    assert {name: value for name, value in found.items() if name.endswith("_stage")} == wanted


@pytest.mark.parametrize(("pipeline", "copies"), [(1, 1), (2, 2)])
def test_stage_parameters_tied_matrices_are_copied_on_both_ends(pipeline, copies):
    """A tied matrix is one on a single stage, and one on each end of a pipeline."""
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    layout = Parallelism(2, pipeline=pipeline)
    stages = [stage_parameters(tied, layout, stage) for stage in range(pipeline)]
    total = count_parameters(tied).total
    assert sum(stage.shared + stage.experts for stage in stages) == total + (copies - 1) * 40 * 8


def test_stage_parameters_of_shared_attention():
    """Layers of one stage that share attention hold it once; a group that is cut is held on both sides."""
    shared = dataclasses.replace(MODEL, attention_sharing=2)
    layouts = (Parallelism(4, pipeline=pipeline) for pipeline in (1, 2, 4))
    whole, halves, cut = (
        sum(sum(stage_parameters(shared, layout, s)[:2]) for s in range(layout.pipeline)) for layout in layouts
    )
    assert whole == halves == count_parameters(shared).total
    assert cut == count_parameters(MODEL).total


def test_layer_activation_bytes_is_the_papers_attention_without_dropout():
    """Korthikanti et al., section 4.1: norms 4 sbh, attention 11 sbh of which 1 is a dropout mask, MLP's input 2 sbh.

    Left after taking away our SwiGLU's three widths of 2 bytes and the normaliser of fused attention.
    """
    dense = ModelConfig(vocab_size=10, d_model=64, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=256, n_experts=1, top_k=1)
    kept = layer_activation_bytes(dense, tokens=100) - 100 * (2 * 3 * 256 + 4 * 4)
    assert kept == (4 + 10 + 2) * 100 * 64


def test_layer_activation_bytes_by_hand():
    """D 8, H Dh 8, G Dh 4, F 6, E 4, K 2: 2 (24 + 16 + 8) + 16, 32 + 32, 2 · 2 (16 + 18): 312 bytes a token."""
    assert layer_activation_bytes(MODEL, 1) == 96 + 16 + 64 + 136
    assert layer_activation_bytes(MODEL, 16, tensor=2) == 16 * 312 / 2
    assert layer_activation_bytes(MODEL, 16, tensor=4) == 16 * (312 + 2 * 2 * 2 * 2) / 4  # 2 heads' keys, on 4 GPUs


def test_gpu_memory_first_stage_holds_a_micro_batch_for_each_stage():
    """Korthikanti et al., equation 5: the first of any number of stages keeps what L layers of a micro-batch do."""
    for pipeline in (1, 2, 4):
        memory = gpu_memory(MODEL, layout_of(pipeline=pipeline), 0)
        assert memory.activations == 4 * layer_activation_bytes(MODEL, 16)
    last = gpu_memory(MODEL, layout_of(pipeline=4), 3)
    assert last.activations == layer_activation_bytes(MODEL, 16)
    assert last.logits == 16 * (4 * 40 + 2 * 2 * 8)


def test_gpu_memory_holds_no_more_micro_batches_than_there_are():
    """A step of one micro-batch keeps one, also on the first of four stages."""
    memory = gpu_memory(MODEL, layout_of(pipeline=4, batch_tokens=32), 0)
    assert memory.activations == layer_activation_bytes(MODEL, 16)


def test_gpu_memory_recomputing_keeps_inputs_and_one_layer():
    """2 s b h for each layer in flight (section 5), and the layer that is being computed again."""
    memory = gpu_memory(MODEL, layout_of(pipeline=2, recompute=True), 0)
    assert memory.activations == 4 * 2 * 16 * 8 + layer_activation_bytes(MODEL, 16)


def test_gpu_memory_zero_splits_experts_over_their_copies():
    """Eight GPUs, experts over 2: optimizers of experts over 4 copies, of all else over 8 ranks."""
    memory = gpu_memory(MODEL, layout_of(expert=2), 0)
    experts = 4 * COUNTS.per_expert / 2
    assert memory.weights == 2 * (COUNTS.total - experts)
    assert memory.optimizer == 12 * (experts / 4 + (COUNTS.total - 2 * experts) / 8)


def test_gpu_memory_fsdp_gathers_two_layers():
    """With split weights the layer that computes and the next are there whole."""
    memory = gpu_memory(MODEL, layout_of(zero="fsdp"), 0)
    layer = (COUNTS.total - COUNTS.embedding - 8) / 4
    assert memory == GpuMemory(
        weights=2 * COUNTS.total / 8,
        gradients=2 * COUNTS.total / 8,
        optimizer=12 * COUNTS.total / 8,
        gathered=2 * 2 * layer + 2 * layer,  # weights of two layers, the gradient of one
        activations=memory.activations,
        logits=memory.logits,
    )


def test_memory_section_of_the_reported_system(gpt4):
    """8 x 15 GPUs have 30.5 GB of weights each; 40 GB do not hold their gradients, too, 80 GB with recomputation do."""
    layout = Parallelism(25_000, tensor=8, pipeline=15)
    small = memory_section(gpt4, layout, GPUS["a100-40gb"], recompute=True)
    large = memory_section(gpt4, layout, GPUS["a100-80gb"], recompute=True)
    assert large["weights_average"] == pytest.approx(30.5e9, rel=0.002)
    assert large["weights"] == pytest.approx(30.5e9, rel=0.015)  # the first stage has the embedding as well
    assert (small["fits"], large["fits"]) == (False, True)
    assert small.notes[-1] == "Change first: zero=2; it then needs 38.98 GB, which fits."


def test_memory_section_advises_in_order_until_it_fits():
    """Recompute, then smaller micro-batches, then ZeRO, then more pipeline; every step says what is then needed."""
    gpu = parse_gpu("name=mini,memory=20e3,flops=1,bandwidth=1,link=1,network=1")
    section = memory_section(RUN, Parallelism(8), gpu, recompute=False, micro_batch_sequences=2)
    advice = section.notes[2:]
    assert [line.split(";")[0] for line in advice] == [
        "Change first: recompute activations",
        "then: micro-batches of one sequence",
        "then: zero=fsdp",
        "then: pipeline=2",
        "then: tensor=2",
    ]
    assert advice[-1].endswith("which fits.")


def test_memory_section_says_when_nothing_helps(gpt4):
    """One GPU cannot hold the reported system, whatever is changed."""
    section = memory_section(gpt4, Parallelism(1), GPUS["h100"], recompute=True)
    assert section.notes[-1].startswith("That is not enough")


def test_memory_section_in_float32_has_no_second_copy_of_the_weights():
    """``train.precision: fp32`` is 4 + 4 + 8 bytes a parameter; mixed precision 2 + 2 + 12."""
    run = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, precision="fp32"))
    found = [memory_section(config, Parallelism(1), GPUS["h100"], recompute=False) for config in (run, RUN)]
    assert [(s["weights"], s["gradients"], s["optimizer"]) for s in found] == [
        tuple(each * COUNTS.total for each in bytes_each) for bytes_each in (FLOAT32, MIXED_PRECISION)
    ]


def test_memory_section_total_is_the_sum_of_its_parts():
    """What is listed is what is added up."""
    section = memory_section(RUN, Parallelism(8, 2, 2, 2), GPUS["h100"], recompute=False)
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "logits")
    assert section["total"] == pytest.approx(sum(section[part] for part in parts))
    assert section["fits"] is True
