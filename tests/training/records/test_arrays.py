"""Recording: right numbers, changing nothing, and the same after an interruption."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_runs import change, run_training, whole_run
from tiny_models import VARIANTS, random_tokens, run_and_record_choices, tiny_model

from moe_gpt.data.batches import MicroBatch, keep_documents_apart
from moe_gpt.measure import routing
from moe_gpt.measure.observation import RoutingSample, choices_on, cross_entropy_gradients, observe_routing
from moe_gpt.model.losses import cross_entropy
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.records.arrays import evaluation_file
from moe_gpt.training.records.lines import describe_routing
from moe_gpt.training.records.metrics import read_metrics


@pytest.mark.parametrize("changes", [{}, {"balance": "bias"}, {"top_k": 1, "normalize_topk": False}, {"top_k": 4}])
def test_sample_of_routing_follows_its_formulas(changes):
    """Means over tokens of what each token's probabilities say, worked out token by token, layer by layer."""
    model, tokens = tiny_model(**changes), random_tokens(3, 5)
    sample = observe_routing(model, MicroBatch(tokens, tokens), "fp32")
    assert model.training
    for layer, chosen in enumerate(model.eval().hidden_states(tokens)[1]):
        entropy = first = margin = 0.0
        for row in range(15):
            probs, best = chosen.router_probs[row].tolist(), int(chosen.expert_indices[row, 0])
            entropy -= sum(p * math.log(p) for p in probs) / 15
            first += float(chosen.expert_weights[row, 0]) / 15
            margin += (probs[best] - max(p for e, p in enumerate(probs) if e != best)) / 15
        found = [float(values[layer]) for values in (sample.token_entropy, sample.first_weight, sample.margin)]
        assert found == pytest.approx([entropy, first, margin], rel=1e-4)
        torch.testing.assert_close(sample.mean_probabilities[layer], chosen.router_probs.mean(0))
        assert float(sample.largest_logit[layer]) == pytest.approx(float(chosen.router_logits.max()))


def test_sample_is_of_whole_sequences_and_of_few_tokens():
    """Of a large micro-batch the first sequences, with their documents apart as in training."""
    model, tokens = tiny_model(), random_tokens(80, 32)
    documents = (tokens == 3).long().cumsum(1)
    sample = observe_routing(model, MicroBatch(tokens, tokens, documents), "fp32")
    routings = model.eval().hidden_states(tokens[:32], document_ids=documents[:32])[1]
    torch.testing.assert_close(sample.mean_probabilities[1], routings[1].router_probs.mean(0))


def test_description_of_a_step_by_hand():
    """Two experts for each of 100 tokens, in two layers: one even and undecided, one uneven."""
    _, stats = tiny_model()(random_tokens(4, 25))
    stats = stats._replace(
        tokens_per_expert=torch.tensor([[50, 50, 50, 50], [100, 60, 40, 0]]), dropped_assignments=torch.tensor([0, 10])
    )
    sample = RoutingSample(
        mean_probabilities=torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]]),
        token_entropy=torch.tensor([math.log(4), 0.0]),
        first_weight=torch.tensor([0.5, 0.9]),
        margin=torch.tensor([0.0, 1.0]),
        largest_logit=torch.tensor([0.0, math.inf]),
    )
    line = describe_routing(stats, sample)
    assert line["load"] == [[1, 1, 1, 1], [2, 1.2, 0.8, 0]]
    assert line["max_violation"] == [0, 1]
    assert line["dead_experts"] == [0, 1]
    assert line["token_entropy"] == line["mean_probability_entropy"] == [1, 0]
    assert line["first_weight"] == [0.5, 0.9]
    assert line["dropped_fraction"] == [0, 0.05]
    assert {len(values) for values in line.values()} == {2}


@pytest.mark.parametrize("variant", VARIANTS)
def test_choices_are_those_of_the_forward_pass(variant):
    """Layer by layer, best first; the model's mode stays; a dense model has no layers."""
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens(3, 12)
    expected = run_and_record_choices(model.eval(), tokens)[1].numpy()
    model.train()
    choices = choices_on(model, tokens.numpy(), "fp32")
    assert model.training
    assert choices.dtype == np.uint8
    assert len(choices) == (0 if variant == "dense" else 2)
    assert np.array_equal(choices, expected[..., : model.config.top_k])


def test_gradients_are_those_of_cross_entropy_alone():
    """As autograd gives them without the auxiliary losses; what training has accumulated stays."""
    model, tokens, targets = tiny_model().eval(), random_tokens(2, 16), random_tokens(2, 16, seed=2)
    ce = cross_entropy(model(tokens).logits, targets)
    (ce.total / ce.n_valid).backward()
    expected = [
        [block.feed_forward.router.weight.grad.norm().item() for block in model.blocks],
        [
            torch.nn.utils.get_total_norm([p.grad for p in block.feed_forward.experts.parameters()]).item()
            for block in model.blocks
        ],
    ]
    before = model.output.weight.grad.clone()
    found = cross_entropy_gradients(model, tokens.numpy(), targets.numpy(), "fp32")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert torch.equal(model.output.weight.grad, before)


def test_documents_are_kept_apart_where_training_does_so():
    """Choices and gradients are those with each document by itself, and not those across its end."""
    model, tokens = tiny_model().eval(), random_tokens(3, 32)
    apart = keep_documents_apart(tokens, tokens, 7)
    _, routings = model.hidden_states(tokens, document_ids=apart.document_ids)
    expected = torch.stack([routing.expert_indices for routing in routings])
    found = choices_on(model, tokens.numpy(), "fp32", end_of_text_id=7)
    assert np.array_equal(found.reshape(2, -1, 2), expected.numpy())
    assert not np.array_equal(found, choices_on(model, tokens.numpy(), "fp32"))
    gradients = [cross_entropy_gradients(model, tokens.numpy(), tokens.numpy(), "fp32", end) for end in (7, None)]
    assert not np.allclose(gradients[0].routers, gradients[1].routers)


def test_router_that_is_cut_off_has_no_gradient():
    """A router that is cut off from the loss has gradient zero, not an error."""

    class Frozen(Router):
        def logits(self, x):
            return super().logits(x).detach()

    torch.manual_seed(0)
    model = MoEGPT(tiny_model().config, make_router=Frozen)
    tokens = random_tokens(2, 17).numpy()
    found = cross_entropy_gradients(model, tokens[:, :-1], tokens[:, 1:], "fp32")
    assert found.routers.tolist() == [0, 0]
    assert (found.experts > 0).all()


def test_run_keeps_what_its_evaluations_found(small_config, tmp_path):
    """Arrays that agree with the lines: scores, violation, choices of the slice, gradients by layer."""
    run, _ = run_training(change(small_config, "train", eval_every_steps=8), tmp_path)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl") if "val/code/ce_loss" in line}
    assert list(lines) == [0, 8, 16, 24, 26]
    arrays = load_file(evaluation_file(tmp_path, 16))
    assert arrays["code/nats"].sum() / arrays["code/counts"].sum() == pytest.approx(lines[16]["val/code/ce_loss"])
    counts = arrays["code/tokens_per_expert"] + arrays["prose/tokens_per_expert"]
    assert routing.max_violation(counts).mean() == pytest.approx(lines[16]["val/max_violation"])
    B, T = arrays["code/tokens"].shape
    assert arrays["code/choices"].shape == (2, B, T, 2)
    assert arrays["gradients/routers"].shape == arrays["gradients/experts"].shape == (2,)
    assert set(lines[16]["samples"]) == {"prose", "code"}
    assert lines[16]["samples"]["code"].startswith("def ")


def without_times(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in ("tokens_per_second", "cpu_seconds")}


@pytest.mark.slow
def test_interrupted_run_records_the_same(small_config, tmp_path):
    """Killed after a later evaluation than its checkpoint, it is brought to the same lines and bytes."""
    config = change(change(small_config, "train", eval_every_steps=8), "checkpoint", every_steps=6)
    whole = whole_run(config)
    run_training(config, tmp_path / "pieces", max_steps=6)
    run_training(config, tmp_path / "pieces", resume=True, max_steps=11)
    evaluation_file(tmp_path / "pieces", 20).write_bytes(b"from a part that was lost")
    (tmp_path / "pieces" / "evaluations" / "step_00000008.safetensors.tmp-abc").write_bytes(b"killed while writing")
    run_training(config, tmp_path / "pieces", resume=True)
    kept, pieces = (sorted((path / "evaluations").iterdir()) for path in (whole, tmp_path / "pieces"))
    names = {path.name for path in kept}
    assert {path.name for path in pieces} - names == {"step_00000006.safetensors", "step_00000011.safetensors"}
    assert all((tmp_path / "pieces" / "evaluations" / path.name).read_bytes() == path.read_bytes() for path in kept)
    records = [
        [without_times(line) for line in read_metrics(path / "metrics.jsonl") if "groups" in line]
        for path in (whole, tmp_path / "pieces")
    ]
    assert records[0] == records[1]
    assert [line["step"] for line in records[0]] == [5, 10, 15, 20, 25]


@pytest.mark.slow
def test_recording_can_be_turned_off_and_changes_no_weight(small_config, tmp_path):
    """Nothing is recorded, sampled or kept; the weights are the same bytes."""
    off = change(small_config, "train", record_every_steps=0, record_tokens=0, sample_tokens=0)
    runs = [run_training(config, tmp_path / name)[0] for name, config in (("on", small_config), ("off", off))]
    for ours, theirs in zip(*(run.state.model.parameters() for run in runs), strict=True):
        assert torch.equal(ours, theirs)
    lines = read_metrics(tmp_path / "off" / "metrics.jsonl")
    assert not any("groups" in line or "samples" in line for line in lines)
    assert "prose/choices" not in load_file(evaluation_file(tmp_path / "off", 26))


def test_dense_run_records_norms_only(small_config, tmp_path):
    """There are no experts to tell of."""
    run_training(change(small_config, "model", n_experts=1, top_k=1), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "groups" in line]
    assert lines
    assert not any("routing" in line for line in lines)
    assert set(load_file(evaluation_file(tmp_path, 26))) >= {"prose/nats", "prose/choices"}
    assert "prose/tokens_per_expert" not in load_file(evaluation_file(tmp_path, 26))


def test_evaluation_that_cannot_be_kept_is_a_warning(small_config, tmp_path, monkeypatch):
    """A full disk costs the report something, and the run nothing."""
    from moe_gpt.training.records import run_log as diary

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diary, "write_evaluation", fail)
    _, outcome = run_training(small_config, tmp_path)
    assert outcome == "finished"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "cannot_record"] == [0, 26]
