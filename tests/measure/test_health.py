"""Health: silent on healthy routers, and right about routers that are broken on purpose, each in its way."""

from __future__ import annotations

import numpy as np
import pytest
from trained_routers import BROKEN, HEALTHY, RecordedRun, read_recorded, train

from moe_gpt.config import FaultConfig, ModelConfig
from moe_gpt.measure.health import Gradients, find_problems


def problems_of(run: RecordedRun) -> dict[str, str]:
    """Return the problems found on the way and at the end, by kind."""
    return {problem.kind: problem.text for problem in run.problems()}


@pytest.fixture(scope="module")
def recorded() -> dict[str, RecordedRun]:
    """One run of each kind, as it was recorded once."""
    return read_recorded()


def test_every_kind_is_recorded(recorded):
    """A new kind of run is recorded too."""
    assert recorded.keys() == HEALTHY.keys() | BROKEN.keys()


@pytest.mark.parametrize("name", HEALTHY)
def test_recorded_healthy_routers_have_no_problems(recorded, name):
    """At no time of a run."""
    assert problems_of(recorded[name]) == {}


@pytest.mark.parametrize("kind", BROKEN)
def test_recorded_broken_routers_are_found_out(recorded, kind):
    """Each by the problem that it has."""
    assert kind in problems_of(recorded[kind])


def test_a_short_healthy_training_has_no_problems():
    """What training records today is judged as what it recorded once."""
    assert problems_of(train(n_steps=120)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_routers_have_no_problems(seed, name):
    """At no time of a run, whatever the seed."""
    assert problems_of(train(seed=seed, **HEALTHY[name])) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_routers_are_found_out(kind):
    """Each by the problem that it has."""
    assert kind in problems_of(train(**BROKEN[kind]))


def record(**changes) -> dict:
    """Return a recorded step of a healthy router with two layers of four experts."""
    values = {
        "load": [[1.1, 0.9, 1.2, 0.8]] * 2,
        "max_violation": [0.2, 0.2],
        "router_z_loss": [7.0, 7.0],
        "mean_probability_entropy": [0.99, 0.99],
        "token_entropy": [0.9, 0.9],
    }
    return values | changes


def judge(records, gradients=None, every=50, **model):
    """Judge with windows of four records."""
    return find_problems(records, gradients, ModelConfig(n_experts=4, **model), FaultConfig(), every)


def test_problems_by_hand():
    """Each threshold on either side; layers are named; texts have the numbers."""
    growing = [record(max_violation=[0.2, v], router_z_loss=[z, 7.0]) for v, z in ((0.8, 20), (1.0, 25), (1.3, 31))]
    found = judge([r for r in growing for _ in range(4)])
    assert [(p.kind, p.layer) for p in found] == [("z_growing", 0), ("imbalance_growing", 1)]
    assert "had 1.8 times the mean load, now 2.3" in found[1].text
    assert judge([r for r in growing for _ in range(4)][:-1]) == []  # less than three windows
    (blind,) = judge([record(token_entropy=[0.9, 0.986])] * 12)
    assert (blind.kind, blind.layer) == ("routing_ignores_input", 1)
    assert "0.40% of the information" in blind.text
    (frozen,) = judge([record()], Gradients(np.array([1e-5, 0.1]), np.array([0.1, 0.1])), top_k=1, normalize_topk=False)
    assert (frozen.kind, frozen.layer) == ("router_not_learning", 0)
    assert "nothing detaches" in frozen.advice


def test_nothing_is_said_of_dense_models_and_of_nothing():
    """A model without experts and a run without records have no problems."""
    assert judge([]) == []
    assert find_problems([record()] * 12, None, ModelConfig(n_experts=1, top_k=1), FaultConfig(), 50) == []


def test_steps_that_were_not_finite_are_no_problem_of_the_router():
    """Their values are unknown (null in the file), and unknown is not small."""
    unknown = record(token_entropy=[None, None], router_z_loss=[None, None])
    assert judge([record()] * 8 + [unknown] + [record()] * 3) == []
