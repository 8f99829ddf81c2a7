"""One optimizer step: accumulation, averaging, clipping, the balancing bias, faults."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_gpt.config import LossConfig, ModelConfig, OptimizerConfig, RunConfig
from moe_gpt.data.batches import MicroBatch, keep_documents_apart, split_batch
from moe_gpt.data.stream import Batch
from moe_gpt.model.losses import IGNORED_TARGET
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training import step
from moe_gpt.training.optimizer import build_optimizer, update_expert_bias
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import TrainState, accumulate_gradients, train_step

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 64, "n_layers": 2, "d_model": 32, "n_heads": 2, "head_dim": 16, "d_ff": 32, "n_experts": 4}


def make_state(**model_settings) -> tuple[TrainState, RunConfig]:
    config = RunConfig(model=ModelConfig(**{**SHAPE, **model_settings}))
    torch.manual_seed(0)
    model = MoEGPT(config.model)
    return TrainState(model, build_optimizer(model, config.optimizer)), config


def make_batch(n_sequences: int = 8, seq_len: int = 16) -> MicroBatch:
    tokens = torch.randint(64, (n_sequences, seq_len + 1), generator=torch.Generator().manual_seed(1))
    return MicroBatch(tokens[:, :-1].clone(), tokens[:, 1:].clone())


def cut(batch: MicroBatch, *sizes: int) -> list[MicroBatch]:
    return [MicroBatch(*parts) for parts in zip(batch.inputs.split(sizes), batch.targets.split(sizes), strict=True)]


def gradients(state: TrainState, micro_batches: list[MicroBatch], loss: LossConfig) -> tuple:
    state.model.zero_grad()
    terms, stats = accumulate_gradients(state.model.train(), micro_batches, loss, "fp32")
    counts = stats.tokens_per_expert if stats else None
    return terms, counts, [parameter.grad.clone() for parameter in state.model.parameters()]


@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 2), (1,) * 8])
def test_accumulation_equals_one_large_batch(sizes):
    """The gradient does not depend on how a batch is cut, up to rounding; ignored targets do not spoil that."""
    state, config = make_state(balance="bias")
    batch = make_batch()
    batch.targets[:3, 5:] = IGNORED_TARGET  # micro-batches with unequal numbers of valid tokens
    loss = LossConfig(router_z_loss_weight=0)  # auxiliary terms are means over each micro-batch's own tokens
    whole = gradients(state, [batch], loss)
    parts = gradients(state, cut(batch, *sizes), loss)
    torch.testing.assert_close(parts[0].ce_loss, whole[0].ce_loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-4, atol=1e-6)  # fp32 sums in another order


def test_z_loss_accumulates_like_one_large_batch():
    """The z loss is a mean over tokens, so equal micro-batches give the gradient of the whole batch."""
    state, _ = make_state()
    loss = LossConfig(load_balancing_loss_weight=0, router_z_loss_weight=0.1)
    whole, parts = gradients(state, [make_batch()], loss), gradients(state, cut(make_batch(), 4, 4), loss)
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-4, atol=1e-6)


def test_step_logs_what_it_optimised():
    """The logged loss is the weighted sum of the logged terms, and those are means over the whole batch."""
    state, config = make_state()
    batch = make_batch()
    with torch.no_grad():
        logits = state.model.train()(batch.inputs).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    metrics = train_step(state, cut(batch, 5, 3), StepPlan(16, 128, 1e-3), config, "fp32").metrics
    torch.testing.assert_close(metrics.ce_loss, expected, rtol=1e-5, atol=1e-5)
    total = metrics.ce_loss + 0.01 * metrics.load_balancing_loss + 1e-3 * metrics.router_z_loss
    torch.testing.assert_close(metrics.loss, total, rtol=1e-6, atol=1e-6)
    assert (state.step, state.tokens_seen) == (1, 128)


def test_step_uses_the_plans_learning_rate():
    """A step at learning rate 0 changes no weight, a step at a positive one does."""
    state, config = make_state()
    before = [p.clone() for p in state.model.parameters()]
    train_step(state, [make_batch()], StepPlan(16, 128, 0.0), config, "fp32")
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    train_step(state, [make_batch()], StepPlan(16, 128, 1e-3), config, "fp32")
    assert not any(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_step_reports_the_norm_before_clipping():
    """grad_norm is that of the whole gradient; what reaches the optimizer has at most max_grad_norm."""
    state, config = make_state()
    _, _, grads = gradients(state, [make_batch()], config.loss)
    expected = torch.cat([g.flatten() for g in grads]).norm()
    state.model.zero_grad()
    config = dataclasses.replace(config, optimizer=OptimizerConfig(max_grad_norm=1e-3, beta1=0.0))
    state = TrainState(state.model, build_optimizer(state.model, config.optimizer))
    metrics = train_step(state, [make_batch()], StepPlan(16, 128, 1e-3), config, "fp32").metrics
    torch.testing.assert_close(metrics.grad_norm, expected, rtol=1e-5, atol=1e-6)
    first_moments = torch.cat([state.optimizer.state[p]["exp_avg"].flatten() for p in state.model.parameters()])
    torch.testing.assert_close(first_moments.norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_step_with_a_non_finite_gradient_moves_nothing(balance):
    """Weights, moments and balancing bias stay bit for bit; the tokens count as seen and the step says so."""
    state, config = make_state(balance=balance)
    train_step(state, [make_batch()], StepPlan(16, 128, 1e-3), config, "fp32")
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    moments = [state.optimizer.state[p]["exp_avg"].clone() for p in state.model.parameters()]
    with torch.no_grad():
        broken = state.model.final_norm.weight[0].clone()
        state.model.final_norm.weight[0] = float("nan")
    metrics = train_step(state, [make_batch()], StepPlan(16, 128, 1e-3), config, "fp32").metrics
    with torch.no_grad():
        state.model.final_norm.weight[0] = broken
    assert bool(metrics.skipped)
    assert state.tokens_seen == 256
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    after = [state.optimizer.state[p]["exp_avg"] for p in state.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_loss_that_is_not_finite_moves_nothing_even_where_the_gradient_is(monkeypatch):
    """An infinite term without a gradient is as much a fault as one with."""
    state, config = make_state()
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    real = step.combine_losses

    def broken(*arguments):
        terms = real(*arguments)
        return terms._replace(loss=terms.loss + torch.tensor(float("inf")))

    monkeypatch.setattr(step, "combine_losses", broken)
    metrics = train_step(state, [make_batch()], StepPlan(16, 128, 1e-3), config, "fp32").metrics
    assert bool(metrics.skipped)
    assert bool(torch.isfinite(metrics.grad_norm))
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())


def test_step_learns_a_repeated_batch():
    """Thirty steps on one batch bring the loss well below where it started."""
    state, config = make_state()
    losses = [
        float(train_step(state, [make_batch()], StepPlan(16, 128, 3e-3), config, "fp32").metrics.ce_loss)
        for _ in range(30)
    ]
    assert losses[-1] < losses[0] - 1.0


def test_bias_moves_towards_the_mean_load():
    """Overloaded experts lose exactly u, underloaded gain u, those at the mean stay (arXiv 2408.15664)."""
    state, _ = make_state(balance="bias")
    update_expert_bias(state.model, torch.tensor([[10, 2, 6, 6], [6, 6, 6, 6]]), 0.25)
    first, second = (block.feed_forward.router.expert_bias for block in state.model.blocks)
    assert first.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert second.tolist() == [0.0] * 4


def test_bias_moves_once_a_step_and_never_in_evaluation():
    """Three micro-batches move the bias by one u; forward passes alone never move it."""
    state, config = make_state(balance="bias")
    router = state.model.blocks[0].feed_forward.router
    state.model.eval()(make_batch().inputs)
    state.model.train()(make_batch().inputs)
    assert not router.expert_bias.any()
    train_step(state, cut(make_batch(), 3, 3, 2), StepPlan(16, 128, 1e-3), config, "fp32")
    steps = (router.expert_bias / 1e-3).round(decimals=3).abs().unique()
    assert set(steps.tolist()) <= {0.0, 1.0}
    assert router.expert_bias.any()


def test_bias_balances_a_skewed_router():
    """With the bias on, a router that prefers one expert is brought to an even load."""
    state, config = make_state(balance="bias", bias_update_rate=0.003, n_layers=1)
    router = state.model.blocks[0].feed_forward.router
    with torch.no_grad():
        router.weight[0] = 0.3 * state.model.blocks[0].feed_forward_norm(state.model.embedding.weight).mean(0)
    for _ in range(80):
        train_step(state, [make_batch()], StepPlan(16, 128, 0.0), config, "fp32")
    balanced = train_step(state, [make_batch()], StepPlan(16, 128, 0.0), config, "fp32").metrics.max_violation
    router.expert_bias.zero_()
    unbalanced = train_step(state, [make_batch()], StepPlan(16, 128, 0.0), config, "fp32").metrics.max_violation
    assert balanced < 0.25 < unbalanced


def test_optimizer_decays_matrices_only():
    """Norms and the embedding are in the group without decay, every other matrix in the one with it."""
    state, _ = make_state()
    decaying, others = ({id(p) for p in group["params"]} for group in state.optimizer.param_groups)
    for name, parameter in state.model.named_parameters():
        expected = others if "norm" in name or name.startswith("embedding") else decaying
        assert id(parameter) in expected, name
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.1, 0.0]


def test_split_batch_uses_as_few_micro_batches_as_fit():
    """All are full but the last, and their order is the batch's."""
    rows = torch.arange(7 * 4).view(7, 4).numpy()
    parts = split_batch(Batch(rows, rows + 1), micro_batch_tokens=13, device=CPU)
    assert [len(part.inputs) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.inputs for part in parts]), torch.from_numpy(rows))
    assert torch.equal(torch.cat([part.targets for part in parts]), torch.from_numpy(rows + 1))


def test_documents_are_numbered_and_no_target_crosses_their_end():
    """End-of-text belongs to the document that it ends; what follows it is another's."""
    inputs = torch.tensor([[5, 0, 6, 7, 0, 0, 8]])
    targets = torch.tensor([[0, 6, 7, 0, 0, 8, 9]])
    micro = keep_documents_apart(inputs, targets, end_of_text_id=0)
    assert micro.document_ids.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert micro.targets.tolist() == [[0, -100, 7, 0, -100, -100, 9]]
