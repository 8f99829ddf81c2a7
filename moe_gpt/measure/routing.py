"""What a router does, as numbers: balance, change over training, pairs of experts, domains, positions and tokens.

Pure functions over numpy arrays on the host. ``counts`` (..., E) are assignments, of which a token makes K;
``choices`` (..., N, K) are expert ids, best first, all K of a token different; the L layers lead where arrays are
stacked. Logarithms are natural. The definitions are those of OLMoE (arXiv 2409.02060, section 5 of v2) unless a
docstring cites another source.

Of a row of counts without any assignment nothing is known: its loads, shares and entropy are nan, and it neither
violates the balance nor has dead experts. Every function raises ``ValueError`` for counts that are empty, negative or
not finite, for choices that are empty, have ids outside 0 to E - 1 or name an expert twice for a token, and for arrays
whose shapes do not fit; docstrings name only what else it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Real


def max_violation(counts: Any) -> Any:
    """Return how far the busiest expert is above the mean: max / mean - 1 (MaxVio, arXiv 2408.15664).

    From 0, exactly balanced, to E - 1, one expert takes all (E / K - 1 with the K different experts of a token). Chance
    gives a little more than 0, and the less the more assignments are counted.

    ``counts`` are a numpy array or a torch tensor, which stays on its device, in float32, and whose values are not
    checked, as that would wait for the device.
    """
    if hasattr(counts, "amax"):  # a tensor
        counts = counts.float()
        return (counts.amax(-1) / counts.mean(-1).clamp(min=1e-9) - 1).clamp(min=0)
    return np.asarray(np.nan_to_num(load(counts).max(axis=-1), nan=1.0) - 1)


def load(counts: Real[np.ndarray, "... E"]) -> Float[np.ndarray, "... E"]:
    """Return each expert's share of the assignments in units of the even share: E · n_e / Σ n.

    From 0, unused, to E, takes all; 1 is even and is what chance gives. The mean over experts is 1. The shares are the
    f of the load-balancing loss (Switch, arXiv 2101.03961, eq. 5) for any K.
    """
    return _shares(counts, of_even_share=True)


def dead_experts(counts: Real[np.ndarray, "... E"], threshold: float = 0.01) -> Bool[np.ndarray, "... E"]:
    """Tell which experts have a load below ``threshold``.

    Chance makes none at the default, 1 % of the even load, once the mean count is above about 20. The limit is ours.
    """
    return load(counts) < threshold


def saturation(choices: Integer[np.ndarray, "L N K"], final: Integer[np.ndarray, "L N K"]) -> Float[np.ndarray, " L"]:
    """Return how much of the final routing an earlier checkpoint has: the mean over tokens of |E ∩ E_final| / K.

    E is the set of a token's experts, so their order does not count (section 5.1). From 0 to 1; chance is K / E where
    loads are even, more where both checkpoints prefer the same experts. Both arrays are of the same tokens.
    """
    if np.shape(choices) != np.shape(final):
        raise ValueError(f"choices and final must have the same shape, got {np.shape(choices)} and {np.shape(final)}")
    choices, final = (_check_choices(ids, ("L", "N", "K")) for ids in (choices, final))
    shared = sum((choices == final[..., [place]]).sum(axis=-1) for place in range(final.shape[-1]))
    return np.mean(shared, axis=-1) / final.shape[-1]


def co_activation(choices: Integer[np.ndarray, "N K"], n_experts: int) -> Float[np.ndarray, "E E"]:
    """Return the share of expert i's tokens that also go to j, at [i, j]: N_ij / N_i (section 5.2).

    From 0 to 1; not symmetric where loads differ. Chance is (K - 1) / (E - 1) where loads are even, and
    ``co_activation_by_chance`` otherwise. The diagonal and the rows of unused experts are nan; every other row sums to
    K - 1. All pairs of a token's experts count, whereas OLMoE's script counts only neighbours in the list.
    """
    choices = _check_choices(choices, ("N", "K"), n_experts)
    pairs = choices[:, :, None] * n_experts + choices[:, None, :]  # (N, K, K), an expert with itself included
    tokens = np.bincount(pairs.ravel(), minlength=n_experts**2).reshape(n_experts, n_experts)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        shares = tokens / np.diagonal(tokens)[:, None]
    np.fill_diagonal(shares, np.nan)
    return shares


def co_activation_by_chance(choices: Integer[np.ndarray, "N K"], n_experts: int) -> Float[np.ndarray, "E E"]:
    """Return what ``co_activation`` would be if only the loads decided: (K - 1) · n_j / (Σ n - n_i) at [i, j].

    The other K - 1 places of a token of expert i are filled from the other experts in proportion to their counts n. The
    diagonal is nan; rows sum to K - 1, those of unused experts too. A definition of ours: it keeps the row sums of
    ``co_activation`` exactly, but n_i times its row i is a symmetric table only where loads are even.
    """
    choices = _check_choices(choices, ("N", "K"), n_experts)
    counts = np.bincount(choices.ravel(), minlength=n_experts)
    others = np.maximum(counts.sum() - counts, 1)  # 0 only for K = 1, where nothing is to be shared
    chance = (choices.shape[1] - 1) * counts / others[:, None]
    np.fill_diagonal(chance, np.nan)
    return chance


def domain_shares(counts: Real[np.ndarray, "n_sources ... E"]) -> Float[np.ndarray, "n_sources ... E"]:
    """Return the share of each domain's assignments that each expert gets: n_se / Σ_e n_se.

    Domains are sources of text. From 0 to 1, summing to 1 over experts; chance is 1 / E. OLMoE (section 5.3) divides by
    tokens instead: its domain specialization is K times this, with chance K / E.
    """
    if np.ndim(counts) < 2:
        raise ValueError(f"counts must have shape (n_sources, ..., E), domains first, got {np.shape(counts)}")
    return _shares(counts)


class DomainInformation(NamedTuple):
    """How much an assignment's expert tells about its domain."""

    nats: float
    """Mutual information; 0 where all domains use the experts alike."""
    fraction: float
    """Of the bound min(ln n_sources, ln E)."""


def domain_information(counts: Real[np.ndarray, "n_sources E"]) -> DomainInformation:
    """Return the mutual information between domain and expert of an assignment: H(mean of p_s) - mean of H(p_s).

    p_s are the shares of the experts in domain s and H is the entropy. All domains have equal weight, however many
    tokens they have, so this is also the Jensen-Shannon divergence of the p_s. Chance gives 0, but for a bias upwards
    of about (n_sources - 1)(E - 1) / (2 · assignments) nats. Domains that share no expert reach ln n_sources; the K
    different experts of a token keep it below ln(E / K). One domain or one expert gives 0 and 0. A summary of ours of
    the domain specialization in section 5.3. Every domain needs an assignment.
    """
    if np.ndim(counts) != 2:
        raise ValueError(f"counts must have shape (n_sources, E), one layer, got {np.shape(counts)}")
    shares = domain_shares(counts)
    unknown = np.flatnonzero(np.isnan(shares[:, 0]))
    if unknown.size:
        raise ValueError(f"every domain must have an assignment, got none for {unknown.tolist()}; leave them out")
    bound = float(np.log(min(shares.shape)))
    nats = float(_entropy(shares.mean(axis=0)) - _entropy(shares).mean())
    nats = min(max(nats, 0.0), bound)  # rounding may step over either
    return DomainInformation(nats, nats / bound if bound else 0.0)


class RoutingLocality(NamedTuple):
    """How often neighbouring tokens go to the same expert."""

    share: float
    """Of the consecutive positions, with the same first choice."""
    chance: float
    """The same for tokens in random order."""


def routing_locality(choices: Integer[np.ndarray, "B T K"]) -> RoutingLocality:
    """Return the share of consecutive positions with the same first choice, and what chance gives: Σ p_e².

    p are the experts' shares of the first choices; chance is 1 / E where they are even and more otherwise. Pairs lie
    within a sequence, which needs two positions; where documents are packed, a pair across their border counts. Mixtral
    (arXiv 2401.04088, table 5) gives the share for its first choices, and 1 / E as chance.
    """
    first = _check_choices(choices, ("B", "T", "K"))[..., 0]
    if first.shape[1] < 2:
        raise ValueError(f"a sequence must have at least 2 positions to have neighbours, got {first.shape[1]}")
    shares = _shares(np.bincount(first.ravel()))
    return RoutingLocality(float(np.mean(first[:, 1:] == first[:, :-1])), float((shares**2).sum()))


@dataclass(frozen=True)
class TokenShare:
    """A token id, as one expert sees it. No tuple, because ``count`` is a method of tuples."""

    token: int
    count: int
    """How often it was sent to the expert."""
    share: float
    """Of its occurrences; 0 to 1."""
    excess: float
    """``count`` beyond what the expert's load gives, in tokens."""


def vocabulary_specialisation(
    tokens: Integer[np.ndarray, " N"],
    choices: Integer[np.ndarray, "N K"],
    n_experts: int,
    min_count: int = 10,
    top: int = 10,
) -> list[list[TokenShare]]:
    """Return for each expert the token ids that it sees most beyond chance.

    Of an id x that occurs n_x times and goes to expert e n_xe times, the share n_xe / n_x is OLMoE's vocabulary
    specialization (section 5.4). The excess is n_xe - n_x · K · s_e, with s_e the expert's share of all assignments.
    Only a positive excess is listed, the largest first, equal ones by id. Sorted by share the list would be one of rare
    ids; the excess also weighs how much of the expert's work an id is. Chance gives a share of K / E where loads are
    even and an excess of 0, give or take sqrt(n_x · K · s_e).

    Args:
        tokens: input ids; for OLMoE's other views, the predicted or the true next ids.
        choices: of the same tokens, in one layer.
        n_experts: E, the length of the result.
        min_count: ids that occur less often are left out, as chance alone gives them large shares.
        top: most entries for each expert, at least 1.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    ids, occurrences, counts = _count_tokens(tokens, choices, n_experts)
    excess_times_n = len(tokens) * counts - occurrences[:, None] * counts.sum(axis=0)  # whole, so ties are exact
    frequent = occurrences >= min_count
    result = []
    for expert in range(n_experts):
        excess, count = excess_times_n[:, expert], counts[:, expert]
        rows = np.flatnonzero(frequent & (excess > 0))
        rows = rows[np.argsort(-excess[rows], kind="stable")][:top]  # ids ascend, so equal ones stay sorted by id
        columns = ids[rows], count[rows], count[rows] / occurrences[rows], excess[rows] / len(tokens)
        result.append([TokenShare(*row) for row in zip(*(column.tolist() for column in columns), strict=True)])
    return result


def token_concentration(
    tokens: Integer[np.ndarray, " N"], choices: Integer[np.ndarray, "N K"], n_experts: int, min_count: int = 10
) -> float:
    """Return how far the token id alone decides the expert: the mean over ids x of max_e n_xe / n_x.

    Every id that occurs at least ``min_count`` times has the same weight; nan where none does. From K / E, all ids go
    to all experts alike, to 1, every id has an expert that it always goes to. Chance is K / E where loads are even, and
    more at small counts, as a maximum of noisy shares is biased upwards. A summary of ours of the vocabulary
    specialization in section 5.4.
    """
    _, occurrences, counts = _count_tokens(tokens, choices, n_experts)
    frequent = occurrences >= min_count
    if not frequent.any():
        return float("nan")
    return float((counts[frequent].max(axis=1) / occurrences[frequent]).mean())


def _count_tokens(
    tokens: Integer[np.ndarray, " N"], choices: Integer[np.ndarray, "N K"], n_experts: int
) -> tuple[Integer[np.ndarray, " n_ids"], Integer[np.ndarray, " n_ids"], Integer[np.ndarray, "n_ids E"]]:
    """Return the different ids in ascending order, how often each occurs, and how often it went to each expert."""
    choices = _check_choices(choices, ("N", "K"), n_experts)
    if np.shape(tokens) != choices.shape[:1]:
        raise ValueError(f"tokens must have shape {choices.shape[:1]}, one id for each choice, got {np.shape(tokens)}")
    ids, rows = np.unique(tokens, return_inverse=True)
    cells = rows[:, None] * n_experts + choices
    counts = np.bincount(cells.ravel(), minlength=len(ids) * n_experts).reshape(len(ids), n_experts)
    return ids, np.bincount(rows), counts


def _shares(counts: Real[np.ndarray, "... E"], of_even_share: bool = False) -> Float[np.ndarray, "... E"]:
    """Return each expert's share of a row; with ``of_even_share`` in units of 1 / E."""
    values = np.asarray(counts, dtype=np.float64)  # exact up to 2^53
    if not values.ndim or not values.size:
        raise ValueError(f"counts must have shape (..., E) and not be empty, got {values.shape}")
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"counts must be finite and at least 0, got {values.min()} to {values.max()}")
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        return values * (values.shape[-1] if of_even_share else 1) / values.sum(axis=-1, keepdims=True)


def _entropy(shares: Float[np.ndarray, "... E"]) -> Float[np.ndarray, "..."]:
    logarithms = np.log(shares, where=shares > 0, out=np.zeros_like(shares))  # 0 ln 0 is 0
    return np.asarray(0 - (shares * logarithms).sum(axis=-1))  # and not -0


def _check_choices(
    choices: Integer[np.ndarray, "... K"], axes: tuple[str, ...], n_experts: int | None = None
) -> Integer[np.ndarray, "... K"]:
    """Return the ids in int64, as products of small integer types would overflow."""
    choices = np.asarray(choices)
    if choices.ndim != len(axes) or not choices.size or choices.dtype.kind not in "iu":
        wanted, found = f"({', '.join(axes)})", f"{choices.dtype} of {choices.shape}"
        raise ValueError(f"choices must be whole numbers of shape {wanted} and not empty, got {found}")
    choices = choices.astype(np.int64, copy=False)
    if choices.min() < 0 or (n_experts is not None and choices.max() >= n_experts):
        limit = "" if n_experts is None else f" and below n_experts={n_experts}"
        raise ValueError(f"expert ids must be at least 0{limit}, got {choices.min()} to {choices.max()}")
    ordered = np.sort(choices, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if repeated.any():
        raise ValueError(f"the experts of a token must be different, got {choices[repeated][0].tolist()}")
    return choices
