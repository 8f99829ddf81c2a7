"""A decoder with a scalar head: its scores, its scale, and its checkpoints."""

from __future__ import annotations

import pytest
import torch
from made_up_checkpoint import make_run, save_checkpoint
from tiny_models import VARIANTS, random_tokens, tiny_model

from moe_gpt.errors import InputError
from moe_gpt.post_training.reward_model import RewardModel, load_reward_model
from moe_gpt.training.saving.saved_model import load_model


def reward_model(**changes) -> RewardModel:
    """Return a reward model on the tiny decoder."""
    return RewardModel.from_model(tiny_model(**changes))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_head_reads_the_models_last_hidden_states(changes):
    """Every shape: body and hidden states are the model's, the value is their product with the head."""
    model = tiny_model(**changes)
    reward = RewardModel.from_model(model)
    tokens = random_tokens(2, 7)
    values, output = reward.values(tokens, torch.ones(2, 7, dtype=torch.bool))
    hidden, _ = model.hidden_states(tokens)
    torch.testing.assert_close(values, hidden @ reward.output.weight[0])
    assert (output.router_stats is None) == model.config.is_dense


def test_head_starts_at_the_stated_deviation():
    """1/sqrt(d + 1), over many numbers; so that scores of a new model are about 1."""
    torch.manual_seed(0)
    weight = RewardModel.from_model(tiny_model(d_model=4096, n_layers=1, d_ff=1, n_experts=2)).output.weight
    assert weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_score(side):
    """The score is that of the last valid token, on whichever side padding is."""
    model, tokens = reward_model(), random_tokens(1, 6)
    alone, _ = model.scores(tokens, torch.ones(1, 6, dtype=torch.bool))
    padding = random_tokens(1, 3, seed=5)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    valid = torch.cat([torch.full_like(part, part is tokens, dtype=torch.bool) for part in parts], dim=1)
    together, _ = model.scores(torch.cat(parts, dim=1), valid)
    torch.testing.assert_close(together, alone)


def test_normalised_scores_have_mean_0_and_deviation_1():
    """Also where they had another scale before; differences keep their order."""
    model, tokens, valid = reward_model(), random_tokens(16, 6), torch.ones(16, 6, dtype=torch.bool)
    raw, _ = model.scores(tokens, valid)
    model.normalise(torch.tensor([3.0, 5.0]))
    model.normalise(model.scores(tokens, valid)[0])
    torch.testing.assert_close(model.scores(tokens, valid)[0], (raw - raw.mean()) / raw.std(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_scores_without_spread_are_refused(scores):
    """Dividing by their deviation would give no numbers."""
    model = reward_model()
    with pytest.raises(InputError, match="must differ"):
        model.normalise(torch.tensor(scores))
    assert model.output.std == 1


def test_a_value_model_starts_from_the_reward_model():
    """With its head and its scale, in tensors of its own."""
    model = reward_model()
    model.normalise(torch.tensor([3.0, 5.0]))
    value = RewardModel.from_model(model)
    tokens, valid = random_tokens(2, 6), torch.ones(2, 6, dtype=torch.bool)
    assert value.values(tokens, valid)[0].equal(model.values(tokens, valid)[0])
    assert value.output.weight.data_ptr() != model.output.weight.data_ptr()


@pytest.mark.parametrize("changes", [{}, {"balance": "bias"}, {"tie_embeddings": True}])
def test_a_checkpoint_gives_the_same_scores(tmp_path, changes):
    """It is written as that of any other model, and read with scale and balancing bias."""
    state, identity = make_run(**changes)
    state.model = RewardModel.from_model(state.model)
    state.model.normalise(torch.tensor([3.0, 5.0]))
    path = save_checkpoint(tmp_path, state, identity)
    loaded = load_reward_model(path)
    tokens, valid = random_tokens(3, 6) % state.model.config.vocab_size, torch.ones(3, 6, dtype=torch.bool)
    assert loaded.scores(tokens, valid)[0].equal(state.model.scores(tokens, valid)[0])
    with pytest.raises(InputError, match="is of a reward model"):
        load_model(path)


def test_an_ordinary_checkpoint_is_refused(tmp_path):
    """The message says that it is no reward model."""
    path = save_checkpoint(tmp_path, *make_run())
    with pytest.raises(InputError, match="must be of a reward model"):
        load_reward_model(path)
