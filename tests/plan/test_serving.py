"""Inference: the reported shape's cache, experts touched by brute force, roofline by hand, speculation by its paper."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_gpt.config import ModelConfig
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.plan.hardware import GPUS, Parallelism
from moe_gpt.plan.options import PlanOptions
from moe_gpt.plan.quantities import PlanSection, to_json
from moe_gpt.plan.serving import (
    best_gamma,
    cache_share,
    compute_bound_batch,
    decoding_step,
    expected_experts_touched,
    expected_tokens_per_step,
    kv_cache_bytes_per_token,
    serving_sections,
    speculation_section,
    speculative_speedup,
    speculative_speedup_on,
    weight_bytes_per_gpu,
)

GPT4 = load_run_config("gpt4.yaml").model
TINY = ModelConfig(vocab_size=10, n_layers=2, d_model=4, n_heads=2, head_dim=2, d_ff=3, n_experts=3, top_k=2)
A100 = GPUS["a100-80gb"]
REPORTED = PlanOptions(gpu=A100, serving=Parallelism(128, tensor=8, pipeline=16), batch=4096)
SMALL = PlanOptions(gpu=A100, serving=Parallelism(2, pipeline=2), batch=3)


def sections_of(config: ModelConfig, options: PlanOptions, context: int) -> list[PlanSection]:
    """Return all that a plan says about serving."""
    return [*serving_sections(config, options, context), speculation_section(config, options, context)]


def test_reported_cache_sizes_come_out():
    """recipe.md: 61.4 kB a token and 2.0 GB for 32k; with full heads 168 times that, 10.3 MB and 338 GB."""
    one, full = kv_cache_bytes_per_token(GPT4), kv_cache_bytes_per_token(GPT4, GPT4.n_heads)
    assert one == 2 * 120 * 128 * 2 == 61_440
    assert one * 32_768 == pytest.approx(2.0e9, rel=0.01)
    assert full == 168 * one == 10_321_920
    assert full * 32_768 == pytest.approx(338e9, rel=0.001)


def test_cache_scales_with_heads():
    """Eight heads take eight times one."""
    assert kv_cache_bytes_per_token(GPT4, 8) == 8 * kv_cache_bytes_per_token(GPT4)
    assert kv_cache_bytes_per_token(TINY) == 2 * 2 * 1 * 2 * 2  # two tensors, layers, one head, width 2, 2 bytes


def test_reported_weights_per_gpu_come_out():
    """recipe.md: 30.5 GB at 8 x 15; at 8 x 16 the fullest stage has 8 layers of 120 too, at 8 x 20 only 6."""
    assert weight_bytes_per_gpu(GPT4, Parallelism(120, 8, 15)) == pytest.approx(30.5e9, rel=0.02)  # with a matrix
    assert weight_bytes_per_gpu(GPT4, Parallelism(128, 8, 16)) == pytest.approx(30.5e9, rel=0.002)
    assert weight_bytes_per_gpu(GPT4, Parallelism(160, 8, 20)) == pytest.approx(30.5e9 * 6 / 8, rel=0.02)


def test_weights_per_gpu_by_hand():
    """436 parameters, 80 of them embedding and output: whole on one GPU; with a stage per layer half and one matrix."""
    layer = (436 - 80) / 2
    assert weight_bytes_per_gpu(TINY, Parallelism(1)) == 2 * 436
    assert weight_bytes_per_gpu(TINY, Parallelism(2, pipeline=2)) == 2 * (layer + 40)
    assert weight_bytes_per_gpu(TINY, Parallelism(4, tensor=2, pipeline=2)) == 2 * (layer + 40) / 2
    three = dataclasses.replace(TINY, n_layers=3)  # two stages of 2 and 1 layers: either end has a matrix
    fullest = weight_bytes_per_gpu(three, Parallelism(2, pipeline=2)) / 2
    assert fullest == pytest.approx(2 * layer + 40, abs=2)  # the final norm's 4


@pytest.mark.parametrize(
    ("heads", "sequences", "tensor", "share"),
    [(1, 1, 8, 1), (1, 8, 8, 1 / 8), (1, 9, 8, 2 / 9), (168, 1, 8, 1 / 8), (4, 1, 8, 1 / 4), (3, 1, 1, 1)],
)
def test_cache_share_of_the_fullest_gpu(heads, sequences, tensor, share):
    """One head of one sequence lies on one GPU; eight sequences share eight; nine leave two on one."""
    assert cache_share(heads, sequences, tensor) == pytest.approx(share)


@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_tokens"), [(2, 1, 3), (3, 2, 3), (4, 2, 4), (5, 3, 2), (4, 1, 5), (3, 3, 2), (6, 2, 0)]
)
def test_experts_touched_is_what_counting_all_outcomes_gives(n_experts, top_k, n_tokens):
    """Every way in which the tokens can choose, counted: the mean is exact."""
    choices = [set(choice) for choice in itertools.combinations(range(n_experts), top_k)]
    touched = [len(set().union(*outcome)) for outcome in itertools.product(choices, repeat=n_tokens)]
    assert expected_experts_touched(n_experts, top_k, n_tokens) == pytest.approx(sum(touched) / len(touched))


def test_experts_touched_agrees_with_the_chain():
    """16 experts, 2 a token, 30 tokens: the Markov chain from one token to the next gives the same mean."""
    chain = [1.0] + [0.0] * 16
    for _ in range(30):
        after = [0.0] * 17
        for m, p in enumerate(chain):
            for new in range(3):
                if m + new <= 16:
                    after[m + new] += p * math.comb(16 - m, new) * math.comb(m, 2 - new) / math.comb(16, 2)
        chain = after
    assert expected_experts_touched(16, 2, 30) == pytest.approx(sum(m * p for m, p in enumerate(chain)))


@given(st.integers(1, 64), st.data())
def test_experts_touched_grows_with_the_batch(n_experts, data):
    """K for one token, never more than E or B · K, and more for every further token until all are touched."""
    top_k, n_tokens = data.draw(st.integers(1, n_experts)), data.draw(st.integers(1, 500))
    touched = expected_experts_touched(n_experts, top_k, n_tokens)
    assert expected_experts_touched(n_experts, top_k, 1) == pytest.approx(top_k)
    assert top_k - 1e-9 <= touched <= min(n_experts, n_tokens * top_k) + 1e-9
    assert touched <= expected_experts_touched(n_experts, top_k, n_tokens + 1)


def test_decoding_step_reads_and_multiplies_by_hand():
    """One token: all but an expert a layer and the embedding; two FLOPs a weight but norms; five cached positions."""
    step = decoding_step(TINY, 1, 5, 1)
    norms, active = 2 * 2 * 4 + 4, 364 - 40
    assert step.weight_bytes == pytest.approx(2 * active)
    assert step.cache_bytes == 5 * 16
    assert step.flops == 2 * (active - norms) + 5 * 4 * 2 * 2 * 2  # scores: 4 · heads · width · layers a position
    many = decoding_step(TINY, 50, 5, 1, tokens_each=2)
    assert many.weight_bytes == pytest.approx(2 * (436 - 40))
    assert many.cache_bytes == 50 * 5 * 16
    assert many.flops == 100 * step.flops


def test_decoding_step_reads_shared_attention_in_every_layer():
    """Layers that share attention weights each read them: they save memory, not time."""
    shared = dataclasses.replace(TINY, attention_sharing=2)
    assert decoding_step(shared, 1, 1, 1).weight_bytes == decoding_step(TINY, 1, 1, 1).weight_bytes


def test_decoding_speed_at_batch_one_is_the_active_weights_over_the_bandwidth():
    """279 B active x 2 B over 8 x 2.039 TB/s is 34.2 ms, 29 tokens/s; twice the bandwidth is twice as fast."""
    gpu, step = A100, decoding_step(GPT4, 1, 1, 8)
    assert step.seconds(gpu, 8) == pytest.approx(2 * 278.9e9 / (8 * 2.039e12), rel=0.002)
    assert step.seconds(gpu, 8) == 2 * step.seconds(dataclasses.replace(gpu, bandwidth=2 * 2.039e12), 8)
    assert step.seconds(gpu, 8) == step.reading_seconds(gpu, 8) > step.multiplying_seconds(gpu, 8)


def test_compute_bound_batch_is_where_reading_and_multiplying_cross():
    """Just below, reading takes longer; there, multiplying; for a dense model it is FLOP/s over bandwidth."""
    gpu = A100
    batch = compute_bound_batch(GPT4, gpu)
    assert batch == pytest.approx(312 / 2.039 * 1832.6 / 278.9, rel=0.01)
    dense = dataclasses.replace(GPT4, n_experts=1, top_k=1)
    assert compute_bound_batch(dense, gpu) in (154, 155)  # norms are read and not multiplied
    for n, is_compute_bound in ((int(batch) - 1, False), (int(batch), True)):
        step = decoding_step(GPT4, n, 1, 1)._replace(cache_bytes=0)
        assert (step.multiplying_seconds(gpu, 1) * 1.000001 >= step.reading_seconds(gpu, 1)) is is_compute_bound


def test_compute_bound_batch_is_infinite_where_the_cache_takes_longer():
    """With 168 key-value heads a cache of 8k takes longer to read than a token to multiply, at any batch."""
    full = dataclasses.replace(GPT4, n_kv_heads=168)
    assert compute_bound_batch(full, A100, 8192) == math.inf
    assert compute_bound_batch(GPT4, A100, 8192) < math.inf


@pytest.mark.parametrize(
    ("acceptance", "gamma", "speed"), [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 10, 6.86)]
)
def test_speculative_speedup_is_the_papers(acceptance, gamma, speed):
    """Table 1 of arXiv 2211.17192: speed where drafting is free (c = 0); it is then the tokens per step, eq. 1."""
    assert speculative_speedup(acceptance, 0, gamma) == pytest.approx(speed, abs=0.005)
    closed = (1 - acceptance ** (gamma + 1)) / (1 - acceptance)
    assert expected_tokens_per_step(acceptance, gamma) == pytest.approx(closed)


def test_speculation_limits():
    """Nothing drafted: one token, no gain. Nothing accepted: only cost. All accepted: gamma + 1 tokens."""
    assert expected_tokens_per_step(0.7, 0) == speculative_speedup(0.7, 0.1, 0) == 1
    assert expected_tokens_per_step(0, 5) == 1
    assert speculative_speedup(0, 0.1, 5) == pytest.approx(1 / 1.5)
    assert expected_tokens_per_step(1, 4) == 5
    assert speculative_speedup(1, 0.25, 4) == pytest.approx(2.5)


def test_best_gamma_by_hand_and_in_the_limits():
    """0.8 and 0.05: the gains at 7, 8, 9 are 3.08, 3.09, 3.08. No gain drafts nothing; sure acceptance all it may."""
    assert best_gamma(0.8, 0.05) == 8
    assert best_gamma(0.2, 0.5) == best_gamma(0, 0.1) == 0
    assert best_gamma(1, 0.1, max_gamma=20) == best_gamma(0.9, 0, max_gamma=20) == 20


@given(st.floats(0, 1), st.floats(0, 1))
def test_drafting_pays_where_acceptance_exceeds_the_cost(acceptance, draft_cost):
    """Corollary 3.9 of arXiv 2211.17192: the gain is at least (1 + alpha) / (1 + c) if alpha > c, else none."""
    best = speculative_speedup(acceptance, draft_cost, best_gamma(acceptance, draft_cost))
    if acceptance > draft_cost:
        assert best >= (1 + acceptance) / (1 + draft_cost) - 1e-9
    else:
        assert best == pytest.approx(1)


def test_verification_costs_experts_and_products():
    """One sequence touches 7.8 experts instead of 2 and gains nothing; 64 touch all and gain it all; 4096 lose."""
    gains = [speculative_speedup_on(GPT4, REPORTED, n, 1024) for n in (1, 64, 4096)]
    assert expected_experts_touched(16, 2, 5) == pytest.approx(7.79, abs=0.01)
    assert gains == [pytest.approx(0.96, abs=0.01), pytest.approx(2.80, abs=0.01), pytest.approx(0.65, abs=0.01)]
    dense = dataclasses.replace(GPT4, n_experts=1, top_k=1)
    assert speculative_speedup_on(dense, REPORTED, 1, 1024) == pytest.approx(speculative_speedup(0.8, 0.05, 4))


@pytest.mark.parametrize("n_gpus", [128, 300])
def test_cost_is_the_price_of_all_gpus_over_the_speed(n_gpus):
    """A cluster's price an hour buys an hour of tokens: dollars per token times tokens per second, spares included."""
    options = dataclasses.replace(REPORTED, serving=Parallelism(n_gpus, 8, 16), price=1.5)
    speed = serving_sections(GPT4, options, 8192)[2]
    per_second = speed["cost_per_thousand_tokens"] / 1000 * speed["tokens_per_second_cluster"]
    assert per_second == pytest.approx(1.5 * n_gpus / 3600)
    assert speed["cost_per_million_tokens"] == 1000 * speed["cost_per_thousand_tokens"]


def test_sections_of_the_reported_cluster():
    """128 A100 of 80 GB: one copy of 30.5 GB a GPU; 4096 a stage fit at no more than context_that_fits."""
    sections = sections_of(GPT4, REPORTED, 8192)
    assert [s.name for s in sections] == ["kv_cache", "serving_memory", "serving_speed", "speculative_decoding"]
    cache, memory, speed, speculation = sections
    assert (cache["full_over_this"], speed["copies"], speed["spare_gpus"], memory["fits"]) == (168, 1, 0, False)
    assert any("does not fit" in note for note in memory.notes)
    assert any("does not fit" in note for note in speed.notes)
    longest = memory["context_that_fits"]
    fits = [serving_sections(GPT4, REPORTED, context)[1]["fits"] for context in (longest, longest + 1)]
    assert fits == [True, False]
    assert speed["tokens_per_expert"] == 512  # recipe.md: batch 4k+ is about 500 tokens per expert
    assert speculation["speedup"] == pytest.approx(2.80, abs=0.01)


def test_sections_count_spare_gpus():
    """300 GPUs are two copies of 128 and 44 spares, which are paid for: twice the speed, more dollars a token."""
    more = dataclasses.replace(REPORTED, serving=Parallelism(300, tensor=8, pipeline=16))
    one, two = (serving_sections(GPT4, options, 8192)[2] for options in (REPORTED, more))
    assert (two["copies"], two["spare_gpus"]) == (2, 44)
    assert any("44 spare GPUs" in note for note in two.notes)
    assert two["tokens_per_second_cluster"] == pytest.approx(2 * one["tokens_per_second_cluster"])
    assert two["cost_per_thousand_tokens"] == pytest.approx(one["cost_per_thousand_tokens"] * 300 / 256)


def test_section_names_are_unique_and_values_plain():
    """Names do not repeat, values are numbers, truth values or text; dense models have no experts to touch."""
    dense = dataclasses.replace(TINY, n_experts=1, top_k=1)
    for config in (TINY, dense):
        sections = sections_of(config, SMALL, 5)
        plan = to_json(sections)
        for section in sections:
            values = plan[section.name]
            assert len(values) == len(section.quantities)
            assert all(isinstance(v, int | float | str | bool | None) for v in values.values())
        assert ("tokens_per_expert" in to_json(sections)["serving_speed"]) is not config.is_dense


def test_bad_numbers_are_refused_by_name():
    """Functions check what they are given, too."""
    with pytest.raises(InputError, match="n_kv_heads must divide n_heads=2, got 3"):
        kv_cache_bytes_per_token(TINY, 3)
    with pytest.raises(InputError, match="top_k must be at most n_experts=2, got 3"):
        expected_experts_touched(2, 3, 1)
    with pytest.raises(InputError, match=r"n_sequences must be a whole number from 1 to 2\^63 - 1, got 0"):
        decoding_step(TINY, 0, 1, 1)
    with pytest.raises(InputError, match=r"context must be a whole number from 1 to 2\^63 - 1, got 0"):
        serving_sections(TINY, SMALL, 0)
    with pytest.raises(InputError, match="acceptance must be a number from 0 to 1, got 1.2"):
        speculative_speedup(1.2, 0.1, 4)
    with pytest.raises(InputError, match="draft_cost must be a number of at least 0, got -0.1"):
        best_gamma(0.8, -0.1)
    with pytest.raises(InputError, match="gamma must be a whole number from 0 to 1000, got 1001"):
        expected_tokens_per_step(0.8, 1001)


def test_cluster_that_does_not_divide_the_model_is_refused():
    """Heads by tensor; no more stages than layers."""
    for serving, message in ((Parallelism(9, tensor=3), "tensor=3"), (Parallelism(3, pipeline=3), "pipeline=3")):
        with pytest.raises(InputError, match=f"^when serving, model.* got {message}"):
            serving_sections(TINY, dataclasses.replace(SMALL, serving=serving), 5)
