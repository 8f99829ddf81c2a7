"""Scaling laws: the tables and figures of their papers, limits, and the forecast of 2020 by hand."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.plan.quantities import to_json
from moe_gpt.plan.scaling_laws import (
    CHINCHILLA,
    CHINCHILLA_REFIT,
    CHINCHILLA_UNROUNDED,
    FLOPS_PER_PF_DAY,
    GPT3_COMPUTE,
    KAPLAN_PARAMETERS,
    KAPLAN_TOKENS,
    KRAJEWSKI_DENSE,
    ForecastInputs,
    extrapolate,
    kaplan_loss,
    kaplan_optimal,
    krajewski_loss,
    optimal_by_rule,
    optimal_section,
    predict_section,
)

TINY = ModelConfig(vocab_size=10, n_layers=2, d_model=4, n_heads=2, head_dim=2, d_ff=3, n_experts=3, top_k=2)
GOPHER = 5.76e23
SIZES = st.floats(1e6, 1e14)


@pytest.mark.parametrize("law", [KAPLAN_PARAMETERS, KAPLAN_TOKENS, GPT3_COMPUTE])
def test_power_law_inverse_returns_what_went_in(law):
    """needed_for undoes loss, and the loss is 1 at the scale."""
    assert law.needed_for(law.loss(3e9)) == pytest.approx(3e9)
    assert law.loss(law.scale) == 1


def test_kaplan_constants_are_those_of_the_paper():
    """Exponents and scales of arXiv 2001.08361, eqs. 1.1 and 1.2."""
    assert KAPLAN_PARAMETERS == (8.8e13, 0.076)
    assert KAPLAN_TOKENS == (5.4e13, 0.095)


def test_kaplan_loss_meets_its_limits():
    """Eq. 1.5 without shortage of text is (6.4e13 / N)^0.076, and with a huge model (1.8e13 / D)^0.103."""
    assert kaplan_loss(1e9, 1e40) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    assert kaplan_loss(1e40, 1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103)
    assert kaplan_loss(6.4e13, 1.8e13) == pytest.approx(2**0.103)  # by hand: (1 + 1)^0.103


def test_kaplan_joint_and_separate_fits_agree_within_three_percent():
    """The two fits of one paper (table 2, eq. 1.1) differ in their constants, not in what they say."""
    for n in (1e8, 1e10, 1e12):
        assert kaplan_loss(n, 1e40) == pytest.approx(KAPLAN_PARAMETERS.loss(n), rel=0.03)


def test_kaplan_optimum_is_the_papers_at_one_pf_day():
    """Table 6 of arXiv 2001.08361: 1.3e9 parameters and 2e10 tokens at 1 PF-day; 10 x the compute, 5.4 x the model."""
    assert kaplan_optimal(FLOPS_PER_PF_DAY) == (1.3e9, 2e10)
    n, d = kaplan_optimal(10 * FLOPS_PER_PF_DAY)
    assert n / 1.3e9 == pytest.approx(5.37, abs=0.01)  # Chinchilla's introduction quotes 5.5 and 1.8
    assert d / 2e10 == pytest.approx(1.86, abs=0.01)


def test_gpt3_curve_gives_its_loss():
    """Fig. 3.1 of arXiv 2005.14165: the largest model ends near 1.73 after 3.64e3 PF-days (table D.1)."""
    assert GPT3_COMPUTE.loss(1) == pytest.approx(2.57)
    assert GPT3_COMPUTE.loss(3640) == pytest.approx(1.73, abs=0.01)
    assert pytest.approx(3.14e23, rel=0.005) == 3640 * FLOPS_PER_PF_DAY


TABLE_A3 = [
    (2.21e19, 400e6, 9.2e9),
    (1.62e20, 1e9, 27.1e9),
    (2.46e22, 10e9, 410.1e9),
    (1.71e24, 67e9, 4.1e12),
    (1.26e25, 175e9, 12.0e12),  # printed as 1.26e24, which 6 · 175e9 · 12e12 = 1.26e25 corrects
    (3.52e25, 280e9, 20.1e12),
    (1.36e26, 520e9, 43.5e12),
    (5.65e26, 1e12, 94.1e12),
    (8.55e28, 10e12, 1425.5e12),
]


@pytest.mark.parametrize(("flops", "parameters", "tokens"), TABLE_A3)
def test_chinchilla_optimum_is_the_papers(flops, parameters, tokens):
    """Table A3 of arXiv 2203.15556, approach 3: within 11 %, as 400 Million and 4.1 Trillion are rounded themselves."""
    n, d = CHINCHILLA_UNROUNDED.optimal(flops)
    assert n == pytest.approx(parameters, rel=0.08)
    assert d == pytest.approx(tokens, rel=0.11)


def test_chinchilla_optimum_for_gophers_budget():
    """Fig. 4 says 40 B for 5.76e23 FLOPs; the rounded constants of eq. 10 say 32 B, the refit about 20 tokens each."""
    assert CHINCHILLA_UNROUNDED.optimal(GOPHER)[0] == pytest.approx(40e9, rel=0.02)
    assert CHINCHILLA.optimal(GOPHER)[0] == pytest.approx(32e9, rel=0.02)
    n, d = CHINCHILLA_REFIT.optimal(GOPHER)
    assert d / n == pytest.approx(18.4, abs=0.1)
    assert CHINCHILLA.loss(70e9, 1.4e12) < CHINCHILLA.loss(280e9, 300e9)  # Chinchilla beats Gopher


def test_chinchilla_exponents_are_those_of_table_2():
    """Table 2 of arXiv 2203.15556: N grows as C^0.46 and D as C^0.54."""
    (n, d), (larger_n, larger_d) = CHINCHILLA_UNROUNDED.optimal(1e21), CHINCHILLA_UNROUNDED.optimal(1e22)
    assert round(math.log10(larger_n / n), 2) == 0.46
    assert round(math.log10(larger_d / d), 2) == 0.54


@given(st.floats(1e17, 1e28), st.floats(0.3, 3).filter(lambda x: abs(x - 1) > 0.01))
def test_chinchilla_optimum_spends_the_budget_and_is_one(flops, factor):
    """6 N D is the budget, and any other N of that budget has a higher loss."""
    for law in (CHINCHILLA, CHINCHILLA_UNROUNDED, CHINCHILLA_REFIT):
        n, d = law.optimal(flops)
        assert 6 * n * d == pytest.approx(flops)
        assert law.loss(n * factor, d / factor) > law.loss(n, d)


@pytest.mark.parametrize(
    ("flops", "parameters", "tokens"), [(1.92e19, 400e6, 8.0e9), (1.23e22, 10e9, 205.1e9), (GOPHER, 67e9, 1.5e12)]
)
def test_rule_of_20_is_the_first_approach(flops, parameters, tokens):
    """Table 3 of arXiv 2203.15556 (67 B and 1.5 T for Gopher's budget), within 8 %; C = 6 N D and D = 20 N exactly."""
    n, d = optimal_by_rule(flops)
    assert (n, d) == (pytest.approx(parameters, rel=0.08), pytest.approx(tokens, rel=0.08))
    assert (6 * n * d, d / n) == (pytest.approx(flops), 20)


@pytest.mark.parametrize(
    ("active", "tokens", "granularity", "loss"),
    [
        (100e6, 4.37e9, 8, 3.133),
        (1e9, 28.94e9, 16, 2.491),
        (3e9, 72.90e9, 16, 2.245),
        (7e9, 137.60e9, 32, 2.076),
        (70e9, 941.07e9, 32, 1.694),
        (300e9, 2.96e12, 64, 1.503),
        (1e12, 7.94e12, 64, 1.367),
    ],
)
def test_krajewski_loss_is_the_papers(active, tokens, granularity, loss):
    """Table 2 of arXiv 2402.07871, 64 x active: N = active · (8 · 64 + 4) / 12 (section 6.1).

    Within 0.025: the constants of table 1 are rounded, and half a digit of alpha alone moves the first row by 0.017.
    """
    assert krajewski_loss(active * (8 * 64 + 4) / 12, tokens, granularity) == pytest.approx(loss, abs=0.025)


def test_krajewski_law_by_hand():
    """With N, D and G of 1 every term is its factor: 0.47 + 2.1 + 18.1 + 30.8; dense has no granularity."""
    assert krajewski_loss(1, 1, 1) == pytest.approx(51.47)
    assert KRAJEWSKI_DENSE.loss(1, 1) == pytest.approx(43.47)


@given(SIZES, SIZES, st.floats(1, 64))
def test_every_loss_falls_with_size_text_and_granularity(n, d, granularity):
    """More parameters, more tokens or finer experts never predict a higher loss."""
    for law in (kaplan_loss, CHINCHILLA.loss, lambda n, d: krajewski_loss(n, d, granularity)):
        assert law(2 * n, d) < law(n, d)
        assert law(n, 2 * d) < law(n, d)
    assert krajewski_loss(n, d, 2 * granularity) < krajewski_loss(n, d, granularity)


def test_forecast_by_hand():
    """175 · 175 / 1.5 = 20417 B; (8.8e13 / N)^0.076 = 1.1174; (2.57 / L)^(1/0.048) = 3.43e7 PF-days; then D, cost."""
    forecast = extrapolate()
    assert forecast["parameters"] == pytest.approx(20.417e12, rel=1e-4)
    assert forecast["loss"] == pytest.approx(1.1174, abs=1e-4)
    assert forecast["flops"] / FLOPS_PER_PF_DAY == pytest.approx(3.43e7, rel=0.002)
    assert forecast["tokens"] == pytest.approx(5.4e13 * math.exp(-math.log(1.11744) / 0.095), rel=1e-3)
    assert forecast["tokens"] == pytest.approx(16.8e12, rel=0.01)
    assert forecast["cost"] == pytest.approx(43.5e9, rel=0.002)


def test_forecast_has_the_costs_and_the_text_of_2020():
    """The figures that were printed then: 18,300 and 3.43e7 PF-days, $8.6 billion, $1.4 billion on A100s, 23 TB."""
    forecast = extrapolate()
    # by hand: 4.6e6 · 3.43e7 / 18,300 = 8.62e9; / 6 = 1.44e9; / 3 = 2.87e9; 16.8e12 tokens · 570 / 400 bytes = 23.9e12
    assert forecast["gpt3_pf_days_by_law"] == pytest.approx(18_300, rel=0.002)
    assert forecast["pf_days"] == pytest.approx(3.43e7, rel=0.002)
    assert forecast["cost_by_law"] == pytest.approx(8.62e9, rel=0.001)
    assert forecast["cost_by_law_on_a100"] == pytest.approx(1.437e9, rel=0.001)
    assert extrapolate(ForecastInputs(a100_speedup=3))["cost_by_law_on_a100"] == pytest.approx(2.873e9, rel=0.001)
    assert forecast["text_bytes"] == pytest.approx(23.9e12, rel=0.001)
    at_a_rounded_loss = KAPLAN_TOKENS.needed_for(1.12) * 570 / 400
    assert at_a_rounded_loss == pytest.approx(23.3e12, rel=0.002)  # as the note says


def test_forecast_shows_compute_in_flops_and_in_pf_days():
    """One PF-day is 8.64e19 FLOPs, and GPT-3's 3.14e23 FLOPs are 3,634 PF-days (table D.1: 3,640)."""
    forecast = extrapolate()
    for flops, pf_days in (
        ("gpt3_flops", "gpt3_pf_days"),
        ("gpt3_flops_by_law", "gpt3_pf_days_by_law"),
        ("flops", "pf_days"),
    ):
        assert forecast[flops] == pytest.approx(forecast[pf_days] * 8.64e19)
    assert forecast["gpt3_pf_days"] == pytest.approx(3634.26, abs=0.01)
    shown = {quantity.name: quantity.shown() for quantity in forecast.quantities}
    assert (shown["gpt3_pf_days_by_law"], shown["pf_days"]) == ("18,320 PF-days", "34.33 million PF-days")


def test_forecast_says_why_there_are_two_costs():
    """The costs differ by what the law overstates of GPT-3's own compute, and a note has both numbers."""
    forecast = extrapolate(ForecastInputs(gpt3_flops=8.64e22))  # 1,000 PF-days
    overstated = forecast["gpt3_flops_by_law"] / forecast["gpt3_flops"]
    assert overstated == pytest.approx(18.3, abs=0.05)
    assert forecast["cost"] / forecast["cost_by_law"] == pytest.approx(overstated)
    assert any("18,320 PF-days" in note and "1,000 PF-days" in note and "18 times" in note for note in forecast.notes)


def test_forecast_prints_every_input_and_follows_it():
    """Each input is a quantity with the value given, and changing it changes the forecast."""
    results = ("parameters", "loss", "flops", "tokens", "cost", "text_bytes", "cost_by_law_on_a100")
    for name, default in dataclasses.asdict(ForecastInputs()).items():
        assert extrapolate()[name] == default
        changed = extrapolate(ForecastInputs(**{name: 1.01 * default}))
        assert changed[name] == 1.01 * extrapolate()[name]
        assert [changed[r] for r in results] != [extrapolate()[r] for r in results]


def test_forecast_overstates_gpt3s_own_compute_fivefold():
    """With a ratio of 1, N is GPT-3's: L(175e9) = 1.604, where the curve needs 18,300 PF-days; it took 3,640."""
    forecast = extrapolate(ForecastInputs(gpt2_parameters=175e9))
    assert (forecast["parameters"], forecast["loss"]) == (175e9, pytest.approx(1.604, abs=0.001))
    assert forecast["flops"] / 3.14e23 == pytest.approx(5.04, abs=0.02)
    assert any("5 times" in note for note in extrapolate().notes)


def test_predicted_losses_are_the_laws_at_the_models_counts():
    """Chinchilla counts all parameters, Kaplan and Krajewski all but the embeddings; the active ones are fewer."""
    section = predict_section(TINY, 1e9)
    total, active, embedding = (
        436,
        364,
        80,
    )  # by hand: an expert has 3 · 4 · 3 in each of 2 layers, and a token skips one of three
    assert section["chinchilla_total"] == CHINCHILLA.loss(total, 1e9)
    assert section["chinchilla_active"] == CHINCHILLA.loss(active, 1e9)
    assert section["kaplan_active"] == kaplan_loss(active - embedding, 1e9)
    assert section["fine_grained"] == krajewski_loss(total - embedding, 1e9, 2)
    assert section["gpt3_compute"] == GPT3_COMPUTE.loss(6 * active * 1e9 / FLOPS_PER_PF_DAY)


def test_prediction_says_where_a_law_does_not_apply():
    """A mixture of experts is warned about dense laws; a dense model has no fine-grained row and no such warning."""
    dense = ModelConfig(vocab_size=10, n_experts=1, top_k=1)
    assert any("dense models" in note for note in predict_section(TINY, 1e9).notes)
    assert not any("dense models" in note for note in predict_section(dense, 1e9).notes)
    assert "fine_grained" not in [quantity.name for quantity in predict_section(dense, 1e9).quantities]
    assert all("tokenizer" in predict_section(config, 1e9).notes[0] for config in (TINY, dense))


def test_optimal_section_has_every_law():
    """Each law's parameters and tokens, unique names, finite numbers."""
    section = optimal_section(GOPHER)
    assert section["unrounded_parameters"] == pytest.approx(40e9, rel=0.02)
    assert section["rule_of_20_tokens"] == optimal_by_rule(GOPHER)[1]
    assert section["kaplan_parameters"] == kaplan_optimal(GOPHER)[0]
    assert len({quantity.name for quantity in section.quantities}) == len(section.quantities)
    assert all(value is not None for value in to_json([section])["optimal_size"].values())


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_bad_numbers_are_refused_by_name(value):
    """Zero, negative and non-finite arguments raise with the argument's name and the value."""
    calls = {
        "n_tokens": lambda: CHINCHILLA.loss(1e9, value),
        "n_parameters": lambda: kaplan_loss(value, 1e9),
        "granularity": lambda: krajewski_loss(1e9, 1e9, value),
        "flops_budget": lambda: optimal_section(value),
        "tokens": lambda: predict_section(TINY, value),
        "gpt3_cost_dollars": lambda: ForecastInputs(gpt3_cost_dollars=value),
    }
    for name, call in calls.items():
        with pytest.raises(InputError, match=f"^{name} must be a number above 0, got {value}$"):
            call()
