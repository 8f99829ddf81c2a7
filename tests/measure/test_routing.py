"""Measures of routing: by hand on a few tokens, as laws, and against plain loops on random choices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpt.measure.routing import (
    DomainInformation,
    RoutingLocality,
    TokenShare,
    co_activation,
    co_activation_by_chance,
    dead_experts,
    domain_information,
    domain_shares,
    load,
    max_violation,
    routing_locality,
    saturation,
    token_concentration,
    vocabulary_specialisation,
)

NAN = float("nan")
COUNTS = np.array([[3, 1, 0, 4], [2, 2, 2, 2], [0, 0, 0, 8]])
CHOICES = np.array([[0, 1], [1, 0], [0, 2], [2, 1]])  # four tokens, of the experts 0 to 3
MEASURES_OF_COUNTS = [max_violation, load, dead_experts, domain_shares, domain_information]


def draw_choices(seed: int, *shape: int, n_experts: int) -> np.ndarray:
    """Draw ids of the given shape (..., K), different for each token and with uneven loads."""
    generator = np.random.default_rng(seed)
    scores = generator.gumbel(size=(*shape[:-1], n_experts)) + generator.normal(size=n_experts)
    return np.argsort(-scores, axis=-1)[..., : shape[-1]]


def test_max_violation_by_hand():
    """The largest count over the mean of 2, minus 1."""
    np.testing.assert_array_equal(max_violation(COUNTS), [1.0, 0.0, 3.0])
    assert max_violation(COUNTS[0]) == 1.0


def test_max_violation_of_tensors_is_that_of_arrays():
    """A tensor gives what its array gives, as a tensor: by hand, exactly 0 where balanced, and 0 for a row of zeros."""
    counts = np.array([[3, 1, 0, 4], [2, 2, 2, 2], [0, 0, 0, 8], [0, 0, 0, 0]])
    violation = max_violation(torch.from_numpy(counts))
    assert violation.tolist() == max_violation(counts).tolist() == [1.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("n_experts", [1, 3, 16, 49])
def test_balanced_counts_have_exact_values(n_experts):
    """Balanced counts give a violation of exactly 0 and loads of exactly 1."""
    counts = np.full((2, n_experts), 7)
    np.testing.assert_array_equal(max_violation(counts), [0.0, 0.0])
    np.testing.assert_array_equal(load(counts), np.ones((2, n_experts)))
    assert not dead_experts(counts).any()


def test_of_no_assignments_nothing_is_known():
    """A row of zeros gives nan, but no violation and no dead experts, and leaves other rows alone."""
    counts = np.array([[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(max_violation(counts), [0.0, 0.0])
    np.testing.assert_array_equal(load(counts), [[NAN] * 3, [1.0] * 3])
    np.testing.assert_allclose(domain_shares(counts), [[NAN] * 3, [1 / 3] * 3])
    assert not dead_experts(counts).any()


def test_load_by_hand():
    """A load is the count in units of the mean of 2, whatever axes lead."""
    expected = np.array([[1.5, 0.5, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    np.testing.assert_array_equal(load(COUNTS), expected)
    np.testing.assert_array_equal(load(COUNTS[:, None].astype(np.float32)), expected[:, None])


def test_dead_experts_are_below_the_threshold():
    """Of a mean of 100, a count of 0 is dead, one of exactly 1 % is not unless the threshold is above it."""
    counts = np.array([399, 0, 1, 0])
    assert dead_experts(counts).tolist() == [False, True, False, True]
    assert dead_experts(counts, threshold=0.011).tolist() == [False, True, True, True]


@pytest.mark.parametrize("seed", range(3))
def test_balance_follows_a_permutation_of_experts(seed):
    """Permuting experts permutes loads and dead experts, and does not change the violation."""
    generator = np.random.default_rng(seed)
    counts, order = generator.integers(0, 3, size=(2, 3, 8)), generator.permutation(8)
    np.testing.assert_array_equal(load(counts[..., order]), load(counts)[..., order])
    np.testing.assert_array_equal(dead_experts(counts[..., order]), dead_experts(counts)[..., order])
    np.testing.assert_array_equal(max_violation(counts[..., order]), max_violation(counts))


def test_saturation_by_hand():
    """Order does not count: two layers of three tokens share 2, 1, 0 and 2, 2, 1 of two experts."""
    final = np.array([[[0, 1], [0, 1], [0, 1]], [[2, 3], [3, 0], [1, 2]]])
    choices = np.array([[[1, 0], [2, 1], [3, 2]], [[2, 3], [0, 3], [2, 0]]])
    np.testing.assert_allclose(saturation(choices, final), [3 / 6, 5 / 6])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_experts=st.integers(1, 8), data=st.data())
def test_saturation_agrees_with_sets(seed, n_experts, data):
    """Saturation is what an intersection of Python sets, token by token, gives."""
    top_k = data.draw(st.integers(1, n_experts))
    choices, final = draw_choices(seed, 2, 3, 5, top_k, n_experts=n_experts)
    expected = [
        sum(len(set(a) & set(b)) / top_k for a, b in zip(*layer, strict=True)) / 5
        for layer in zip(choices.tolist(), final.tolist(), strict=True)
    ]
    np.testing.assert_allclose(saturation(choices, final), expected, rtol=1e-12)


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (16, 2), (8, 8)])
def test_saturation_is_1_for_the_same_and_by_chance_k_over_e(n_experts, top_k):
    """The same routing gives 1; unrelated even ones K / E, within 5 sigma."""
    generator = np.random.default_rng(0)
    choices, final = generator.random((2, 1, 40_000, n_experts)).argsort(axis=-1)[..., :top_k]
    assert saturation(choices, choices) == 1
    tolerance = 5 * 0.5 / math.sqrt(40_000)  # no share of a token deviates more than a fair coin
    assert saturation(choices, final) == pytest.approx(top_k / n_experts, abs=tolerance)


def test_co_activation_by_hand():
    """Expert 0 has three tokens, two of them with 1; expert 3 has none, so nothing is known of it."""
    expected = [
        [NAN, 2 / 3, 1 / 3, 0],
        [2 / 3, NAN, 1 / 3, 0],
        [1 / 2, 1 / 2, NAN, 0],
        [NAN, NAN, NAN, NAN],
    ]
    np.testing.assert_allclose(co_activation(CHOICES, 4), expected)


def test_co_activation_counts_more_than_neighbours():
    """The first and the third of a token's experts are a pair as well, in both directions."""
    np.testing.assert_array_equal(co_activation(np.array([[2, 0, 1]]), 3), [[NAN, 1, 1], [1, NAN, 1], [1, 1, NAN]])


def test_co_activation_by_chance_by_hand():
    """With counts 3, 3, 2 and 0 of 8, the others of expert 0 have 5 assignments, three of them with 1."""
    expected = [
        [NAN, 3 / 5, 2 / 5, 0],
        [3 / 5, NAN, 2 / 5, 0],
        [3 / 6, 3 / 6, NAN, 0],
        [3 / 8, 3 / 8, 2 / 8, NAN],
    ]
    np.testing.assert_allclose(co_activation_by_chance(CHOICES, 4), expected)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_experts=st.integers(1, 8), data=st.data())
def test_co_activation_agrees_with_loops(seed, n_experts, data):
    """Co-activation is what counting tokens that hold both experts gives, pair by pair."""
    choices = draw_choices(seed, 6, data.draw(st.integers(1, n_experts)), n_experts=n_experts)
    sets = [set(token) for token in choices.tolist()]
    expected = np.full((n_experts, n_experts), NAN)
    for i in range(n_experts):
        with_i = [token for token in sets if i in token]
        for j in range(n_experts):
            if i != j and with_i:
                expected[i, j] = sum(j in token for token in with_i) / len(with_i)
    np.testing.assert_allclose(co_activation(choices, n_experts), expected, rtol=1e-12)


@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (6, 5), (16, 2)])
def test_co_activation_rows_sum_to_the_other_experts_of_a_token(n_experts, top_k):
    """Rows of co-activation and of its chance sum to K - 1; all of chance lies between 0 and 1."""
    choices = draw_choices(0, 30, top_k, n_experts=n_experts)
    chance = co_activation_by_chance(choices, n_experts)
    np.testing.assert_allclose(np.nansum(chance, axis=1), top_k - 1, rtol=1e-12)
    used = np.isin(np.arange(n_experts), choices)
    np.testing.assert_allclose(np.nansum(co_activation(choices, n_experts), axis=1), used * (top_k - 1), rtol=1e-12)
    assert np.nanmax(chance, initial=0) <= 1
    assert np.isnan(chance).sum() == n_experts


def test_co_activation_of_even_loads_is_at_chance():
    """All pairs of four experts equally often give (K - 1) / (E - 1) = 1/3, as does chance."""
    pairs = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], dtype=np.uint8)
    expected = np.where(np.eye(4), NAN, 1 / 3)
    np.testing.assert_allclose(co_activation(pairs, 4), expected)
    np.testing.assert_allclose(co_activation_by_chance(pairs, 4), expected)


def test_co_activation_follows_a_permutation_of_experts():
    """Renaming experts renames rows and columns."""
    choices, order = draw_choices(1, 50, 3, n_experts=6), np.random.default_rng(1).permutation(6)
    for measure in (co_activation, co_activation_by_chance):
        np.testing.assert_allclose(measure(order[choices], 6)[order[:, None], order], measure(choices, 6))


def test_ids_of_a_small_integer_type_do_not_overflow():
    """Ids in int8 give what they give in int64, though products of them do not fit."""
    choices, tokens = draw_choices(2, 200, 4, n_experts=100), np.random.default_rng(2).integers(0, 5, size=200)
    small = choices.astype(np.int8)
    np.testing.assert_array_equal(co_activation(small, 100), co_activation(choices, 100))
    assert token_concentration(tokens.astype(np.int8), small, 100) == token_concentration(tokens, choices, 100)


def test_domain_shares_by_hand():
    """Counts are divided by their sum over experts, for each domain and layer."""
    shares = np.array([[3 / 8, 1 / 8, 0, 1 / 2], [1 / 4] * 4, [0, 0, 0, 1]])
    np.testing.assert_array_equal(domain_shares(COUNTS), shares)
    np.testing.assert_array_equal(domain_shares(np.stack([COUNTS, 3 * COUNTS], axis=1)), np.stack([shares] * 2, axis=1))


def test_domain_information_by_hand():
    """Shares (1, 0) and (1/2, 1/2) have the mean (3/4, 1/4): H is 0.8113 bits, less half a bit, of at most one."""
    information = domain_information(np.array([[6, 0], [5, 5]]))
    bits = 3 / 4 * math.log2(4 / 3) + 1 / 4 * 2 - 1 / 2
    assert information == pytest.approx((bits * math.log(2), bits), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_domains=st.integers(1, 5), n_experts=st.integers(1, 6))
def test_domain_information_agrees_with_loops(seed, n_domains, n_experts):
    """The information is Σ p(s, e) ln(p(s, e) / p(s) p(e)), with every domain as likely, of min(ln n_sources, ln E)."""
    counts = np.random.default_rng(seed).integers(0, 4, size=(n_domains, n_experts))
    counts[:, 0] += 1  # no empty domain
    joint = [[n / sum(row) / n_domains for n in row] for row in counts.tolist()]
    nats = 0.0
    for row in joint:
        for expert, p in enumerate(row):
            if p:
                nats += p * math.log(p * n_domains / sum(other[expert] for other in joint))
    bound = math.log(min(n_domains, n_experts))
    expected = (nats, nats / bound if bound else 0)
    assert domain_information(counts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "nats", "fraction"),
    [
        ([[3, 1, 0, 4]], 0, 0),  # one domain
        ([[3], [5]], 0, 0),  # one expert
        ([[3, 1, 0], [30, 10, 0], [300, 100, 0]], 0, 0),  # identical, however large
        ([[1, 2, 0, 0], [0, 0, 9, 9]], math.log(2), 1),  # disjoint
        ([[7, 0, 0], [0, 1, 0], [0, 0, 2]], math.log(3), 1),
        ([[7, 0], [9, 0], [0, 1], [0, 2]], math.log(2), 1),  # more domains than experts: each has one expert
    ],
)
def test_domain_information_is_0_for_identical_and_full_for_disjoint_domains(counts, nats, fraction):
    """Identical domains give 0, disjoint ones ln n_sources, or ln E if they outnumber experts; all within 0 to 1."""
    information = domain_information(np.array(counts))
    assert information == DomainInformation(pytest.approx(nats, abs=1e-12), pytest.approx(fraction, abs=1e-12))
    assert 0 <= information.fraction <= 1


def test_domain_information_ignores_order():
    """Permuting experts or domains changes nothing."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 9, size=(3, 6))
    other = counts[generator.permutation(3)][:, generator.permutation(6)]
    assert domain_information(other) == pytest.approx(domain_information(counts), rel=1e-12)


def test_routing_locality_by_hand():
    """Two sequences 0 0 1 and 1 1 1 have three of four pairs alike; shares 1/3 and 2/3 make 5/9 by chance."""
    choices = np.array([[[0, 5], [0, 1], [1, 0]], [[1, 2], [1, 0], [1, 0]]])
    assert routing_locality(choices) == RoutingLocality(share=3 / 4, chance=pytest.approx(5 / 9))


def test_routing_locality_of_random_choices_is_at_chance():
    """Tokens routed regardless of their neighbours are at chance, within 5 sigma; one for all is at 1 in both."""
    locality = routing_locality(draw_choices(0, 40, 1000, 2, n_experts=8))
    assert locality.share == pytest.approx(locality.chance, abs=5 * 0.5 / math.sqrt(40 * 999))
    assert routing_locality(np.zeros((2, 3, 1), dtype=int)) == (1, 1)


def test_vocabulary_specialisation_by_hand():
    """Id 7 is sent to expert 0 three times of three, where its load gives 3 · 4/6 = 2; id 9 is the mirror image."""
    tokens = np.array([7, 9, 7, 9, 7, 9])
    choices = np.array([[0], [1], [0], [0], [0], [1]])
    assert vocabulary_specialisation(tokens, choices, 3, min_count=3) == [
        [TokenShare(token=7, count=3, share=1.0, excess=1.0)],
        [TokenShare(token=9, count=2, share=2 / 3, excess=1.0)],
        [],
    ]


def test_vocabulary_specialisation_sorts_by_excess_then_id_and_cuts():
    """The larger excess comes first, equal ones by id; rare ids are left out and lists end at ``top``."""
    tokens = np.repeat([8, 3, 5, 2, 1], [2, 2, 4, 8, 1])
    choices = np.repeat([[0, 1], [0, 2], [2, 1], [0, 1]], [4, 4, 8, 1], axis=0)
    first = vocabulary_specialisation(tokens, choices, 3, min_count=2)[0]
    assert [entry.token for entry in first] == [5, 3, 8]
    assert [entry.excess for entry in first] == pytest.approx([4 - 4 * 9 / 17, 2 - 2 * 9 / 17, 2 - 2 * 9 / 17])
    assert vocabulary_specialisation(tokens, choices, 3, min_count=2, top=2)[0] == first[:2]
    assert [entry.token for entry in vocabulary_specialisation(tokens, choices, 3, min_count=3)[0]] == [5]


@pytest.mark.parametrize("seed", range(5))
def test_vocabulary_agrees_with_loops(seed):
    """Lists and concentration are what counting in dictionaries gives, for all ids and experts."""
    tokens, choices = np.random.default_rng(seed).integers(0, 9, size=60), draw_choices(seed, 60, 2, n_experts=5)
    sent = [(x, e) for x, row in zip(tokens.tolist(), choices.tolist(), strict=True) for e in row]
    frequent = [x for x in range(9) if (tokens == x).sum() >= 5]
    largest = {x: max(sent.count((x, e)) for e in range(5)) / (tokens == x).sum() for x in frequent}
    assert token_concentration(tokens, choices, 5, min_count=5) == pytest.approx(np.mean(list(largest.values())))
    for expert, entries in enumerate(vocabulary_specialisation(tokens, choices, 5, min_count=5, top=9)):
        share = sum(e == expert for _, e in sent) / len(sent)
        excess = {x: sent.count((x, expert)) - (tokens == x).sum() * 2 * share for x in frequent}
        expected = {x: value for x, value in excess.items() if value > 1e-9}
        assert {entry.token: entry.excess for entry in entries} == pytest.approx(expected)
        assert entries == sorted(entries, key=lambda entry: (-entry.excess, entry.token))
        for entry in entries:
            assert entry.count == sent.count((entry.token, expert))
            assert entry.share == pytest.approx(entry.count / (tokens == entry.token).sum())


def test_token_concentration_by_hand():
    """Id 7 goes to expert 0 in all of 2 cases, id 9 to each of three experts in 2 of 3; id 4 is too rare."""
    tokens = np.array([7, 9, 7, 9, 9, 4])
    choices = np.array([[0, 1], [0, 1], [2, 0], [1, 2], [2, 0], [2, 1]])
    assert token_concentration(tokens, choices, 3, min_count=2) == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(token_concentration(tokens, choices, 3, min_count=4))


def test_token_concentration_is_1_where_the_id_decides():
    """Routing by token id gives 1 and lists only ids of that expert; routing regardless of it nearly K / E."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 8, size=20_000)
    by_id = np.stack([tokens % 4, (tokens + 1) % 4], axis=1)
    assert token_concentration(tokens, by_id, 4) == 1
    assert {entry.token for entry in vocabulary_specialisation(tokens, by_id, 4)[1]} == {0, 1, 4, 5}
    by_chance = generator.random((20_000, 4)).argsort(axis=1)[:, :2]
    assert 0.5 <= token_concentration(tokens, by_chance, 4) <= 0.5 + 6 * 0.5 / math.sqrt(2_400)


def test_vocabulary_follows_a_permutation_of_experts():
    """Renaming experts moves their lists and leaves the concentration."""
    tokens, choices = np.random.default_rng(3).integers(0, 6, size=200), draw_choices(3, 200, 2, n_experts=4)
    order = np.array([2, 0, 3, 1])
    lists, moved = (vocabulary_specialisation(tokens, ids, 4) for ids in (choices, order[choices]))
    assert [moved[place] for place in order] == lists
    assert token_concentration(tokens, order[choices], 4) == token_concentration(tokens, choices, 4)


@pytest.mark.parametrize("measure", MEASURES_OF_COUNTS)
@pytest.mark.parametrize(
    ("counts", "text"),
    [(np.zeros((2, 0)), r"\(2, 0\)"), (np.zeros((0, 4)), r"\(0, 4\)"), ([[1.0, -2.0]], "-2.0"), ([[1.0, NAN]], "nan")],
)
def test_counts_must_be_there_and_finite(measure, counts, text):
    """Empty, negative and unknown counts are refused with what was given."""
    with pytest.raises(ValueError, match=text):
        measure(np.array(counts))


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (np.ones(3), r"\(n_sources, E\).*\(3,\)"),
        (np.ones((2, 3, 4)), r"\(2, 3, 4\)"),
        ([[1, 2], [0, 0]], r"got none for \[1\]"),
    ],
)
def test_domain_information_needs_domains_with_assignments(counts, text):
    """Counts of other shapes and domains without assignments are refused."""
    with pytest.raises(ValueError, match=text):
        domain_information(np.array(counts))
    if np.ndim(counts) == 1:
        with pytest.raises(ValueError, match=r"\(n_sources, ..., E\)"):
            domain_shares(counts)


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        (np.zeros((0, 2), dtype=int), r"\(N, K\) and not empty, got int64 of \(0, 2\)"),
        (np.zeros((3, 0), dtype=int), r"\(3, 0\)"),
        (np.zeros(3, dtype=int), r"\(3,\)"),
        (np.zeros((3, 1)), "whole numbers.*float64"),
        (np.array([[0, 4]]), "below n_experts=4, got 0 to 4"),
        (np.array([[-1, 2]]), "at least 0 and below n_experts=4, got -1"),
        (np.array([[0, 1], [3, 3]]), r"must be different, got \[3, 3\]"),
    ],
)
def test_choices_must_be_different_experts(choices, text):
    """Empty choices, other shapes and types, unknown experts and repeated ones are refused."""
    tokens = np.zeros(len(choices), dtype=int)
    for measure in (co_activation, co_activation_by_chance):
        with pytest.raises(ValueError, match=text):
            measure(choices, 4)
    for measure in (vocabulary_specialisation, token_concentration):
        with pytest.raises(ValueError, match=text):
            measure(tokens, choices, 4)


def test_checkpoints_must_have_the_same_shape():
    """Different shapes, empty ones, a missing axis of layers and repeated experts are refused."""
    choices = draw_choices(0, 2, 5, 3, n_experts=6)
    with pytest.raises(ValueError, match=r"got \(2, 5, 3\) and \(2, 5, 2\)"):
        saturation(choices, choices[..., :2])
    for wrong in (choices[:, :0], choices[0]):
        with pytest.raises(ValueError, match=r"shape \(L, N, K\) and not empty"):
            saturation(wrong, wrong)
    with pytest.raises(ValueError, match="must be different"):
        saturation(choices, choices[..., [0, 1, 0]])


def test_other_arguments_are_checked():
    """One position has no neighbour, ids must be as many as choices, and a list has at least one entry."""
    with pytest.raises(ValueError, match="at least 2 positions.*got 1"):
        routing_locality(np.zeros((2, 1, 1), dtype=int))
    for measure in (vocabulary_specialisation, token_concentration):
        with pytest.raises(ValueError, match=r"shape \(4,\).*got \(3,\)"):
            measure(np.zeros(3, dtype=int), CHOICES, 4)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        vocabulary_specialisation(np.zeros(4, dtype=int), CHOICES, 4, top=0)
