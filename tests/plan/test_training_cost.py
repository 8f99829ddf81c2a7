"""What a run computes, takes and costs: by hand, by the published figures, and inverted."""

import dataclasses
import math
import random

import pytest

from moe_gpt.config import ModelConfig, RunConfig, ScheduleConfig, StageConfig
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.measure.flops import count_flops, stage_tokens
from moe_gpt.plan.hardware import GPUS, Parallelism
from moe_gpt.plan.options import Failures, PlanOptions
from moe_gpt.plan.training_cost import (
    best_interval,
    compute_section,
    failures_section,
    goodput,
    mfu_from_duration,
    tokens_from_budget,
)

TINY = ModelConfig(vocab_size=10, n_layers=2, d_model=4, n_heads=2, head_dim=2, d_ff=3, n_experts=4, max_seq_len=64)
STAGES = (
    StageConfig(until_tokens=160, seq_len=16, batch_tokens=[16, 32]),
    StageConfig(until_tokens=640, seq_len=32, batch_tokens=32),
)
SMALL = RunConfig(model=TINY, schedule=ScheduleConfig(stages=STAGES))
A100 = GPUS["a100-80gb"]
REPORTED = PlanOptions(gpu=A100, layout=Parallelism(25_000, tensor=8, pipeline=15), mfu=0.34)


def options(**changes: object) -> PlanOptions:
    """Return those of one A100 at half its peak."""
    return PlanOptions(**({"gpu": A100, "mfu": 0.5} | changes))


@pytest.fixture(scope="module")
def gpt4() -> RunConfig:
    """The reported system."""
    return load_run_config("gpt4.yaml")


def test_stage_tokens_cut_and_prolong():
    """Fewer tokens end the run in a stage, more prolong the last one."""
    assert stage_tokens(SMALL.schedule) == [(16, 160), (32, 480)]
    assert stage_tokens(SMALL.schedule, 100) == [(16, 100)]
    assert stage_tokens(SMALL.schedule, 160) == [(16, 160)]
    assert stage_tokens(SMALL.schedule, 1000) == [(16, 160), (32, 840)]


def test_round_ends_cost_what_their_whole_sequences_do():
    """A stage is planned up to the last whole sequence before its until_tokens, as it is trained."""
    stages = tuple(dataclasses.replace(stage, until_tokens=stage.until_tokens + 15) for stage in STAGES)
    config = dataclasses.replace(SMALL, schedule=ScheduleConfig(stages=stages))
    assert stage_tokens(config.schedule) == stage_tokens(SMALL.schedule)
    for compute in (compute_section, lambda *given: tokens_from_budget(*given, 1e-9)):
        assert compute(config, options()).values == compute(SMALL, options()).values


def test_stage_tokens_of_a_run_that_ends_with_its_data():
    """A last stage without an end needs the tokens to be given."""
    schedule = ScheduleConfig(stages=(STAGES[0], StageConfig(seq_len=32, batch_tokens=32)))
    assert stage_tokens(schedule, 300) == [(16, 160), (32, 140)]
    with pytest.raises(InputError, match=r"schedule.stages.1.until_tokens is null.*give the tokens to plan for"):
        stage_tokens(schedule)


def test_compute_section_sums_stages_exactly():
    """Each stage's tokens cost what its own sequence length makes them cost; 6 N D counts active parameters only."""
    section = compute_section(SMALL, options(price=2.0))
    exact = 160 * count_flops(TINY, 16).training + 480 * count_flops(TINY, 32).training
    assert section["training_flops"] == exact == section["stage_0_flops"] + section["stage_1_flops"]
    assert section["six_n_d"] == 6 * (372 - 10 * 4) * 640  # active parameters but for the untied embedding
    assert section["duration"] == pytest.approx(section["six_n_d"] / (312e12 * 0.5))
    assert section["cost_with_scores"] == pytest.approx(exact / (312e12 * 0.5) / 3600 * 2)


def test_compute_section_shows_flops_at_the_context():
    """The context changes what is shown per token, and no total."""
    default, long = (compute_section(SMALL, options(context=c)) for c in (None, 1000))
    assert default["forward_attention_scores"] == count_flops(TINY, 32).attention_scores
    assert long["forward_attention_scores"] == count_flops(TINY, 1000).attention_scores
    assert long["training"] == long["forward"] + long["backward"] == 3 * long["forward"]
    assert default["training_flops"] == long["training_flops"]


def test_compute_section_of_the_reported_system(gpt4):
    """6 N D is 2.15e25 to 2 %, 95 days and $57 M at 34 %; scores at 8k add 7.6 % to 6 N D; 40 spares are paid for."""
    section = compute_section(gpt4, REPORTED)
    assert section["six_n_d"] == pytest.approx(2.15e25, rel=0.02)
    assert section["duration"] / 86_400 == pytest.approx(95, abs=0.5)
    assert section["cost"] == pytest.approx(57e6, rel=0.01)
    assert section["forward_attention_scores"] / (2 * 278.88e9) == pytest.approx(0.076, abs=0.001)
    assert section["forward"] == pytest.approx(0.56e12 * 1.076, rel=0.01)
    assert section["cost"] < section["cost_with_scores"] < 1.076 * section["cost"]
    assert "25,000 GPUs = 208 x 120 + 40" in section.notes[0]


def test_compute_section_on_the_reported_h100s(gpt4):
    """8,192 H100 x 55 days x $2 is $21.6 M; it takes an MFU of 56 % that the reports do not state."""
    h100s = options(gpu=GPUS["h100"], layout=Parallelism(8192, tensor=8, pipeline=15), price=2.0)
    mfu = mfu_from_duration(gpt4, h100s, 55 * 86_400)["mfu"]
    assert mfu == pytest.approx(0.565, abs=0.005)
    cost = compute_section(gpt4, dataclasses.replace(h100s, mfu=mfu))["cost"]
    assert cost == pytest.approx(21.5e6, rel=0.01)


def test_mfu_from_duration_inverts_the_duration(gpt4):
    """The duration that an MFU gives gives that MFU back, and says where none is possible."""
    duration = compute_section(gpt4, REPORTED)["duration"]
    section = mfu_from_duration(gpt4, REPORTED, duration)
    assert section["mfu"] == pytest.approx(0.34)
    assert section["mfu"] < section["mfu_with_scores"]
    assert "more than its peak" in mfu_from_duration(gpt4, REPORTED, duration / 3).notes[-1]


@pytest.mark.parametrize("tokens", [100, 640, 5000])
def test_tokens_from_budget_invert_the_cost(tokens):
    """What a number of tokens costs buys that number, in the first stage, at the end and beyond."""
    three = options(layout=Parallelism(3), price=1.5)
    section = compute_section(SMALL, dataclasses.replace(three, tokens=tokens))
    by_6nd = tokens_from_budget(SMALL, three, section["cost"])
    exact = tokens_from_budget(SMALL, three, section["cost_with_scores"])
    assert by_6nd["tokens"] == pytest.approx(tokens)
    assert by_6nd["duration"] == pytest.approx(section["duration"])
    assert exact["tokens_with_scores"] == pytest.approx(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mfu": 0}, "mfu must be .*, got 0"),
        ({"mfu": 34}, "mfu must be .* at most 1 .*, got 34"),
        ({"price": -1}, "price must be a number above 0, got -1"),
        ({"tokens": 0}, "tokens must be a number above 0 or null, got 0"),
        ({"tokens": 0.3}, "tokens must be from 1 to .*, got 0.3"),
        ({"context": -5}, r"context must be a whole number from 1 to 2\^63 - 1 or null, got -5"),
        ({"batch": -4}, r"batch must be a whole number from 1 to 2\^63 - 1, got -4"),
        ({"acceptance": 1.2}, "acceptance must be a number from 0 to 1, got 1.2"),
        ({"draft_cost": -0.1}, "draft_cost must be a number of at least 0, got -0.1"),
        ({"gamma": -1}, "gamma must be a whole number from 0 to 1000, got -1"),
        ({"budget": -1}, "budget must be a number above 0 or null, got -1"),
        ({"duration_seconds": 0}, "duration_seconds must be a number above 0 or null, got 0"),
        ({"micro_batch_sequences": 0}, r"micro_batch_sequences must be a whole number from 1 to 2\^63 - 1, got 0"),
        ({"layout": Parallelism(8, tensor=4)}, "model.n_heads=2 must be a multiple of tensor, got tensor=4"),
    ],
)
def test_options_refuse_bad_values(changes, message):
    """What is negative, zero, too large or indivisible is named with its value."""
    with pytest.raises(InputError, match=f"^{message}"):
        compute_section(SMALL, options(**changes))


def test_failures_default_is_llama_3s():
    """Llama 3 (arXiv 2407.21783, table 5): 419 unexpected interruptions in 54 days of 16,384 GPUs."""
    assert Failures().gpu_hours_between == pytest.approx(54 * 24 * 16_384 / 419, rel=0.02)


def test_best_interval_by_hand():
    """Young 1974: sqrt(2 delta M): 60 s to save and a failure every 3 hours make 1,138 s."""
    assert best_interval(3 * 3600, 60) == pytest.approx(math.sqrt(2 * 60 * 10_800)) == pytest.approx(1138.4, abs=0.1)


def test_goodput_without_failures_is_what_saving_leaves():
    """With failures ever rarer, 900 s of work to 100 s of saving make 90 %."""
    assert goodput(900, 1e12, 100, 1000) == pytest.approx(0.9)
    assert goodput(900, 1e-3, 100, 1000) == 0


def test_goodput_is_the_expected_share_of_simulated_runs():
    """A simulation of exponential failures agrees within five standard errors (1 % here)."""
    generator, interval, between, saving, restart = random.Random(0), 900.0, 3600.0, 60.0, 300.0
    spent = 0.0
    segments = 20_000
    for _ in range(segments):
        needed = interval + saving
        while (failure := generator.expovariate(1 / between)) < needed:
            spent += failure
            while (again := generator.expovariate(1 / between)) < restart:  # it may fail while it restarts
                spent += again
            spent += restart
        spent += needed
    assert goodput(interval, between, saving, restart) == pytest.approx(segments * interval / spent, rel=0.01)


def test_best_interval_is_near_the_best_goodput():
    """Young's interval loses at most a thousandth to the best of the exact model, where failures are rare."""
    between, saving = 7200.0, 30.0
    exact = max(goodput(seconds, between, saving, 600) for seconds in range(100, 3000, 5))
    assert goodput(best_interval(between, saving), between, saving, 600) == pytest.approx(exact, rel=1e-3)


def test_failures_section_counts_working_gpus_and_pays_for_all():
    """24,960 GPUs that each fail every 50,000 hours stop every 2.0 hours; the 40 spares are paid, and never fail."""
    section = failures_section(REPORTED, 95 * 86_400, mfu=0.34)
    assert section["seconds_between_failures"] == pytest.approx(50_000 * 3600 / 24_960)
    assert section["effective_mfu"] == pytest.approx(0.34 * section["goodput"])
    assert section["duration_with_failures"] == pytest.approx(95 * 86_400 / section["goodput"])
    assert section["cost_with_failures"] == pytest.approx(25_000 * section["duration_with_failures"] / 3600)
    rarely = dataclasses.replace(REPORTED, failures=Failures(interval_seconds=6 * 3600))
    worse = failures_section(rarely, 95 * 86_400, mfu=0.34)
    assert worse["goodput"] < 0.5 * section["goodput"]


def test_failures_section_of_a_run_that_never_ends():
    """Where failures come faster than restarts the goodput is 0 and the note says so."""
    section = failures_section(dataclasses.replace(REPORTED, failures=Failures(gpu_hours_between=1e-6)), 1e6, 0.34)
    assert section["goodput"] == 0
    assert "never ends" in section.notes[0]


def test_failures_refuse_what_is_not_positive():
    """A value of zero is refused by its name."""
    with pytest.raises(InputError, match="restart_seconds must be a number above 0, got 0"):
        Failures(restart_seconds=0)
