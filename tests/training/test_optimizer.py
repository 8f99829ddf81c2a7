"""AdamW and Muon against PyTorch's own, and running means in fewer bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import change, run_training, weights_and_state
from tiny_models import tiny_model
from torch import nn

from moe_gpt.config import OptimizerConfig
from moe_gpt.errors import InputError
from moe_gpt.training.moments import pack, unpack
from moe_gpt.training.muon import move_along_momentum, orthogonalize
from moe_gpt.training.optimizer import build_optimizer

NONE = torch.zeros(())
KINDS = [("muon", "float32"), ("adamw", "bfloat16"), ("muon", "int8")]


def set_gradients(model: nn.Module, seed: int) -> None:
    """Give every parameter a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_is_pytorchs_to_the_bit():
    """With weight decay, a learning rate of each step, and gradients divided by a scale."""
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build_optimizer(ours, OptimizerConfig(weight_decay=0.3))
    parameters = dict(theirs.named_parameters())
    exempt = {"embedding.weight", *(name for name, p in parameters.items() if p.dim() < 2)}
    groups = [
        {"params": [p for name, p in parameters.items() if (name in exempt) == is_exempt], "weight_decay": decay}
        for is_exempt, decay in ((False, 0.3), (True, 0.0))
    ]
    judge = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(3):
        for group in judge.param_groups:
            group["lr"] = 0.01 * (step + 1)
        set_gradients(ours, step), set_gradients(theirs, step)
        judge.grad_scale, judge.found_inf = torch.tensor(2.0), NONE
        judge.step()
        optimizer.step(0.01 * (step + 1), torch.tensor(2.0), NONE)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_is_pytorchs_and_takes_a_stack_as_its_matrices(shape):
    """Each matrix of a stack moves as torch.optim.Muon moves it alone."""
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    singles = [nn.Parameter(matrix.clone()) for matrix in stack]
    judge = torch.optim.Muon(singles, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    momentum = torch.zeros_like(stack)
    for seed in range(4):
        gradient = torch.randn(stack.shape, generator=torch.Generator().manual_seed(seed))
        for single, part in zip(singles, gradient, strict=True):
            single.grad = part.clone()
        judge.step()
        move_along_momentum(stack, gradient, momentum, torch.tensor(0.02), 0.1, 0.9)
    torch.testing.assert_close(stack, torch.stack([single.detach() for single in singles]), atol=1e-3, rtol=0)


def test_orthogonalized_matrices_have_singular_values_near_one():
    """Whatever they were, zeros excepted."""
    matrices = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    assert not orthogonalize(torch.zeros(2, 4, 4)).any()


def test_muon_moves_attention_and_experts_only():
    """Embedding, output, routers and norms are AdamW's; dense feed-forward networks are Muon's."""
    for changes in ({}, {"n_experts": 1, "top_k": 1}):
        model = tiny_model(**changes)
        *_, muon = build_optimizer(model, OptimizerConfig(name="muon")).param_groups
        taken = {name for name, p in model.named_parameters() if any(p is q for q in muon["params"])}
        assert taken == {
            n for n, _ in model.named_parameters() if "qkv" in n or ".out." in n or "gate_up" in n or "down" in n
        }


@pytest.mark.parametrize(("name", "state_type"), KINDS)
def test_a_skipped_step_moves_nothing(name, state_type):
    """Neither parameters nor running means, though a gradient is not finite."""
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, state_type=state_type))
    set_gradients(model, 0)
    optimizer.step(0.01, torch.ones(()), NONE)
    before = [p.detach().clone() for p in model.parameters()]
    means = {id(p): {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    set_gradients(model, 1)
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    optimizer.step(0.01, torch.tensor(float("nan")), torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(value, means[id(parameter)][key]) for key, value in state.items())


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=600))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_eight_bits_keep_numbers_near_and_signs_and_squares_above_zero(numbers):
    """An error is at most a 60th of the block's largest number; packing again changes nothing."""
    values = torch.tensor(numbers)
    for given_values, is_square in ((values, False), (values.abs(), True)):
        kept, scale = pack(given_values, "int8", is_square)
        found = unpack(kept, scale)
        largest = scale.repeat_interleave(256)[: len(values)]
        assert ((found - given_values).abs() <= largest / 60 + 1e-37).all()
        assert (found * given_values >= 0).all()
        if is_square:
            assert ((found > 0) | (given_values < 1e-30)).all()
        again, scale_again = pack(found, "int8", is_square)
        assert torch.equal(again, kept)
        assert torch.allclose(scale, scale_again)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "state_type"), KINDS)
def test_resume_is_exact(small_config, tmp_path, name, state_type):
    """Weights and running means of a run with a pause are those of one without, to the byte."""
    config = change(small_config, "optimizer", name=name, state_type=state_type)
    run_training(config, tmp_path / "whole", max_steps=4)
    run_training(config, tmp_path / "paused", max_steps=2)
    run_training(config, tmp_path / "paused", resume=True, max_steps=4)
    assert weights_and_state(tmp_path / "whole") == weights_and_state(tmp_path / "paused")


def test_a_run_keeps_its_optimizer(small_config, tmp_path):
    """Another one, or another form of its means, is refused: the saved means would be of no use."""
    run_training(small_config, tmp_path, max_steps=1)
    for key, value in (("name", "muon"), ("state_type", "int8")):
        other = change(small_config, "optimizer", **{key: value})
        with pytest.raises(InputError, match=f"optimizer.{key}"):
            run_training(other, tmp_path, resume=True, allow_changes=["optimizer"], max_steps=2)
