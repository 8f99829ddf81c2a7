"""Contenders do the same work, take turns, and fail by name."""

from __future__ import annotations

import dataclasses
import os
from importlib import metadata

import pytest
import torch
from tiny_models import tiny_config

from moe_gpt.bench import generate, layer, rounds, scaling, train
from moe_gpt.bench.contenders import SHAPES, Workload, build, dense_twin, experts_setting
from moe_gpt.commands import bench
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.measure.flops import count_flops
from moe_gpt.measure.parameters import count_parameters

MODEL = tiny_config(vocab_size=64, n_experts=4, top_k=2, n_layers=2)
WORK = Workload(MODEL, 2, 16, "cpu", "fp32", 32)
HAS_EAGER_EXPERTS_ONLY = int(metadata.version("transformers").partition(".")[0]) < 5
NAMES = [
    "moe_gpt",
    "dense",
    "transformers/eager",
    pytest.param("transformers/grouped_mm", marks=pytest.mark.skipif(HAS_EAGER_EXPERTS_ONLY, reason="transformers 4")),
    "transformers/mistral",
]


@pytest.mark.parametrize("name", NAMES)
def test_contenders_have_the_same_shape_and_learn(name, monkeypatch):
    """As many parameters as ours or its twin, and steps that bring down the loss on one batch."""
    contender = build(name, WORK)
    model = contender._state.model if hasattr(contender, "_state") else contender._model
    is_dense = name in ("dense", "transformers/mistral")
    assert (
        sum(p.numel() for p in model.parameters()) == count_parameters(dense_twin(MODEL) if is_dense else MODEL).total
    )
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(6):
        contender.compute_gradients(tokens)
        contender.update()
        with torch.no_grad():
            losses.append(
                torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
            )
    assert losses[-1] < losses[0]
    assert all(0 < step.optimizer < step.total for step in [contender.step()])


def test_unknown_contender_is_refused():
    """By its name."""
    with pytest.raises(InputError, match="no contender 'nanoGPT'"):
        build("nanoGPT", WORK)


def test_implementation_that_transformers_4_lacks_is_refused(monkeypatch):
    """By name, and the one that it has is asked for by nothing."""
    monkeypatch.setattr(metadata, "version", lambda package: "4.57.6")
    assert experts_setting("eager") == {}
    with pytest.raises(InputError, match="transformers/grouped_mm need transformers 5, got 4.57.6"):
        experts_setting("grouped_mm")


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_twin_has_the_active_parameters(shape):
    """But for the router."""
    model = SHAPES[shape][0]
    ours, twin = count_parameters(model), count_parameters(dense_twin(model))
    assert ours.active - ours.router == twin.total == twin.active


def test_flops_by_hand():
    """Of shape S: two for each matrix parameter that a token meets, and attention over half the sequence."""
    model, _, seq_len = SHAPES["S"]
    flops = count_flops(model, seq_len)
    projections = 256 * (8 + 2) * 32 + 8 * 32 * 256
    assert flops.attention_projections == 2 * 6 * projections
    assert flops.attention_scores == 6 * 2 * 2 * 8 * 32 * 257 // 2
    assert flops.feed_forward == 2 * 6 * 2 * 3 * 256 * 512
    assert flops.router == 2 * 6 * 16 * 256
    assert flops.output == 2 * 4096 * 256
    assert flops.training == 3 * sum(flops)


def count_up(name: str):
    """Make a contender that counts its calls and says where it runs."""
    if name == "broken":
        raise ValueError("cannot be built\nat all")
    if name == "dying":
        return lambda: os._exit(3)
    calls = iter(range(100))
    return lambda: (next(calls), os.getpid())


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
def test_turns_leave_warm_up_out_and_failures_behind(at_once):
    """Each in a process of its own; who fails is named, and the others go on."""
    said: list[str] = []
    names = ["a", "broken", "dying"]
    result = rounds.take_turns(names, count_up, 2, 3, 4, at_once, said.append)
    assert [call for call, _ in result["a"].values] == [4, 5, 6, 7, 8, 9]
    assert {pid for _, pid in result["a"].values} - {os.getpid()}
    assert result["a"].peak_memory_bytes >= 0
    assert said == [
        "broken does not run here: ValueError: cannot be built",
        "dying does not run here: its process ended, with status 3",
    ]


def take_turns_here(names, build, n_rounds, n_turns, warmup, at_once, say):
    """Let contenders take turns in this process: starting Python and torch for each takes seconds."""
    contenders = {name: build(name) for name in names}
    return {name: rounds.Turns([turn() for _ in range(n_turns)], 1) for name, turn in contenders.items()}


@pytest.mark.slow
def test_table_of_training(monkeypatch):
    """Every contender has a line with its figures, and the ratio is ours over its."""
    said: list[str] = []
    monkeypatch.setattr(train, "take_turns", take_turns_here)
    results = train.bench_train(WORK, ["dense"], rounds=1, steps=2, say=said.append)
    assert [result["name"] for result in results] == ["moe_gpt", "dense"]
    for result in results:
        assert result["tokens_per_second"] == pytest.approx(32 / result["seconds_per_step"])
        assert result["peak_memory_bytes"] > 0
    ratio = results[0]["tokens_per_second"] / results[1]["tokens_per_second"]
    assert said[-1].endswith(f"{ratio:.2f} x")
    assert results[0]["mfu"] > 0


@pytest.mark.parametrize("routing", layer.ROUTINGS)
def test_routing_of_the_layer_is_what_it_says(routing):
    """Balanced is even, skewed sends four of five tokens to the same experts; each goes to top_k different ones."""
    moe = layer.make_layer(MODEL, routing)
    _, found = moe(torch.randn(1, 100, MODEL.d_model))
    counts = found.expert_indices.flatten().bincount(minlength=4).tolist()
    assert sum(counts) == 200
    if routing == "balanced":
        assert counts == [50] * 4
    if routing == "skewed":
        assert min(counts[:2]) >= 80


def test_decoding_gives_what_transformers_gives(monkeypatch):
    """The same tokens, so that the same work is timed."""
    made: list[list[int]] = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: made.append(real(self)) or made[-1])
    ours = generate.make_decoder(WORK, 2, 4, "moe_gpt")()
    last = made[-1]
    made.clear()
    theirs = generate.make_decoder(WORK, 2, 4, "transformers/eager")()
    assert [[row[-1]] for row in made[-1]] == last
    assert min(*ours, theirs.first) > 0


def test_weights_that_a_token_reads(monkeypatch):
    """All but the embedding and the experts that the token does not visit; a tied embedding is read for the output."""
    monkeypatch.setattr(generate, "timed", lambda device, work: 1.0)
    counts = count_parameters(MODEL)
    assert generate.weight_reads(WORK) == 2**26 / (counts.active - 64 * MODEL.d_model)
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    reads = generate.weight_reads(dataclasses.replace(WORK, model=tied))
    assert reads == pytest.approx(2**26 / count_parameters(tied).active)


def test_points_of_the_scaling_table_vary_one_size():
    """Every axis has its values once, and each point runs."""
    there = scaling.points("cpu", "fp32")
    for axis in ("experts", "d_ff", "sequences", "seq_len", "checkpointed", "one"):
        values = [point.value for point in there if point.axis == axis]
        assert sorted(set(values)) == values
    assert {point.workload.model.n_experts for point in there if point.axis == "experts"} >= {4, 256}
    assert {p.workload.batch_tokens for p in there if p.axis not in ("sequences", "one")} == {8192}
    assert all(p.workload.n_sequences == 1 for p in there if p.axis == "one")
    assert all(p.workload.activation_checkpointing == (p.axis == "checkpointed") for p in there)


def test_scaling_refuses_an_unknown_axis():
    """With those there are."""
    with pytest.raises(InputError, match="axes must be among experts, .*got width"):
        scaling.bench_scaling("cpu", "fp32", 1, 1, print, ["width"])


def test_unknown_peer_is_refused_before_anything_is_measured():
    """With those there are."""
    with pytest.raises(InputError, match="--against must be among dense, transformers, .*got nanoGPT"):
        train.bench_train(WORK, ["nanoGPT"], 1, 1, print)


def take_no_turn(names, build, *_turns, **_named):
    """Build the contenders here: starting Python and torch for each takes seconds."""
    failures = {}
    for name in names:
        try:
            build(name)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    return {name: rounds.Turns([], 0, failures.get(name)) for name in names}


@pytest.mark.parametrize(
    ("module", "bench"),
    [
        (train, lambda work: train.bench_train(work, ["dense"], 1, 1, print)),
        (generate, lambda work: generate.bench_generate(work, [1], 1, 1, print)),
        (layer, lambda work: layer.bench_layer(work, 1, 1, print)),
    ],
)
def test_nothing_to_compare_is_an_error(monkeypatch, module, bench):
    """Where our own contender cannot be built, its own error is said."""
    monkeypatch.setattr(module, "take_turns", take_no_turn)
    with pytest.raises(InputError, match="does not run here, so there is nothing to compare: .*(CUDA|NVIDIA)"):
        bench(dataclasses.replace(WORK, device="cuda:99"))


@pytest.mark.parametrize("size", ["n_layers: 10_000, d_model: 8192", "vocab_size: 2_000_000_000"])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(size, tmp_path):
    """By whatever builds the whole model; one layer of it may be measured."""
    path = tmp_path / "huge.yaml"
    path.write_text(f"model: {{{size}}}\ndata: {{sources: [{{name: a, builtin: prose}}]}}\n")
    shaped = bench.Shaped(config=str(path), device="cpu")
    for start in (shaped.workload, lambda: bench.loop(config=str(path)), lambda: bench.data(config=str(path))):
        with pytest.raises(InputError, match=r"illion parameters; training needs at least .* of memory"):
            start()
    assert shaped.workload(lambda config, _: load_run_config(config)).model.d_ff == 256
