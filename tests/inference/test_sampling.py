"""Sampling: distributions by hand, draws of many rows at once."""

import math

import pytest
import torch
from torch.testing import assert_close

from moe_gpt.errors import ConfigError
from moe_gpt.inference.sampling import SamplingConfig, draw, next_token_probs, sample

LOGITS = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]


def probs_of(logits: list[float], **sampling: float) -> torch.Tensor:
    """Return the distribution of one sequence's next token."""
    return next_token_probs(torch.tensor([logits]), [SamplingConfig(**sampling)])[0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # probabilities squared
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0, "top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"temperature": 1, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 1, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1, "top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1, "top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1, "top_p": 0.01}, [0, 1, 0, 0]),
        ({"temperature": 1, "top_p": 0.39}, [0, 1, 0, 0]),
        ({"temperature": 1, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1, "top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # top-k first: 4/7 reach 0.5 alone
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),  # temperature first: 16/30 reach 0.5 alone
    ],
    ids=str,
)
def test_next_token_probs_by_hand(sampling, expected):
    """Temperature, then top-k, then top-p, on probabilities .1, .4, .2, .3."""
    probs = probs_of(LOGITS, **sampling)
    assert_close(probs, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)  # float32 rounding


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_next_token_probs_keeps_top_k_tokens_of_a_tie(top_k):
    """top_k keeps exactly that many tokens where several are equally likely (in bf16 they often are)."""
    probs = probs_of([0.0, 1.0, 1.0, 1.0, 1.0], temperature=1, top_k=top_k)
    assert (probs > 0).sum() == top_k


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40])
def test_next_token_probs_of_a_tiny_temperature_is_greedy(temperature):
    """Towards temperature 0 the most likely token gets everything, without overflow."""
    probs = probs_of([1.0, 5.0, 4.0], temperature=temperature)
    assert probs.tolist() == [0, 1, 0]


def test_next_token_probs_of_bf16_logits_are_float32():
    """Probabilities are computed in float32 whatever the logits are."""
    probs = next_token_probs(torch.randn(1, 50).bfloat16(), [SamplingConfig(temperature=0.7, top_p=0.9)])[0]
    assert probs.dtype == torch.float32
    assert_close(probs.sum(), torch.tensor(1.0), atol=1e-6, rtol=0)  # float32 rounding


@pytest.mark.parametrize(("key", "value"), [("top_p", 1.5), ("top_p", 0), ("temperature", -1), ("top_k", -1)])
def test_sampling_config_refuses_what_is_impossible(key, value):
    """An impossible setting is refused by name and value."""
    with pytest.raises(ConfigError, match=rf"{key} must be .*{value}"):
        SamplingConfig(**{key: value})


@pytest.mark.parametrize("settings", [{"top_p": 1e-300}, {"temperature": 1e-310}, {"top_p": 1e-46, "top_k": 3}])
def test_extreme_settings_choose_the_most_likely_token(settings):
    """Whatever float32 makes of the number."""
    probs = probs_of([0.0, 3.0, 1.0], **settings)
    assert probs.tolist() == [0.0, 1.0, 0.0]


SETTINGS = [
    SamplingConfig(temperature=1),
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=0.7, top_p=0.8),
    SamplingConfig(temperature=1.3, top_k=5),
    SamplingConfig(temperature=1, top_k=6, top_p=0.9),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_have_the_distribution(sampling):
    """40,000 draws fit by chi-square, and nothing of probability 0 is ever drawn."""
    probs = next_token_probs(torch.randn(1, 12, generator=torch.Generator().manual_seed(1)), [sampling])
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(2)).tolist()
    counts = torch.bincount(draw(probs.expand(40_000, -1), uniforms), minlength=12)
    possible = probs[0] > 0
    assert counts[~possible].sum() == 0
    expected = probs[0, possible] * 40_000
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = max(int(possible.sum()) - 1, 1)
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations above the mean


def test_a_row_draws_the_same_token_alone_and_among_others():
    """Neither the other rows nor their settings change a row's distribution by a bit."""
    logits = torch.randn(32, 500, generator=torch.Generator().manual_seed(3))
    samplings = [SETTINGS[row % len(SETTINGS)] for row in range(32)]
    together = next_token_probs(logits, samplings)
    for row in range(32):
        assert torch.equal(next_token_probs(logits[row : row + 1], samplings[row : row + 1])[0], together[row])


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_possible_tokens(uniform):
    """The smallest and the largest random number draw a token whose probability is not 0."""
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    assert draw(probs, [uniform]).item() in (1, 3)


def test_greedy_sampling_needs_no_random_numbers():
    """Temperature 0 takes the most likely token, the first of equal ones."""
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    assert sample(logits, [SamplingConfig(temperature=0)] * 2, [0.9, 0.9]).tolist() == [1, 0]
