"""The router's choices and weights: by hand, ties, precision, noise and the balancing bias."""

import pytest
import torch
from tiny_models import tiny_config
from torch.testing import assert_close

from moe_gpt.model.router import Router, choose_experts


def make_router(weight: torch.Tensor, **changes: object) -> Router:
    n_experts, d_model = weight.shape
    router = Router(tiny_config(n_experts=n_experts, d_model=d_model, **changes))
    with torch.no_grad():
        router.weight.copy_(weight)
    return router


def random_router(n_experts: int = 8, d_model: int = 16, **changes: object) -> tuple[Router, torch.Tensor]:
    """Return a router with random weights, and 50 tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_experts, d_model, generator=generator)
    return make_router(weight, **changes), torch.randn(50, d_model, generator=generator)


@pytest.mark.parametrize(
    ("top_k", "normalize_topk", "indices", "weights"),
    [
        (1, False, [2], [5 / 8]),
        (2, False, [2, 1], [5 / 8, 2 / 8]),
        (2, True, [2, 1], [5 / 7, 2 / 7]),
        (3, True, [2, 1, 0], [5 / 8, 2 / 8, 1 / 8]),
    ],
)
def test_router_gives_the_answer_by_hand(top_k, normalize_topk, indices, weights):
    """Logits ln 1, ln 2, ln 5 are probabilities 1/8, 2/8, 5/8; the k largest are chosen, best first."""
    router = make_router(torch.eye(3), top_k=top_k, normalize_topk=normalize_topk)
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    routing = router(logits)
    assert routing.expert_indices.tolist() == [indices]
    assert_close(routing.router_logits, logits)
    # float32 rounding of logarithm, exponential and division
    assert_close(routing.router_probs, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]), atol=1e-6, rtol=0)
    assert_close(routing.expert_weights, torch.tensor([weights]), atol=1e-6, rtol=0)


def test_router_scores_tokens_with_the_rows_of_its_weight():
    """Logit e of a token is the product of the token with row e of the weight, without a bias."""
    router = make_router(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]]))
    logits = router(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).router_logits
    assert_close(logits, torch.tensor([[3.0, 2.0, 0.5], [4.0, -2.0, 1.0]]), atol=0, rtol=0)  # small whole numbers


@pytest.mark.parametrize("n_experts", [4, 64])  # beyond 16 values an unstable sort shows
def test_router_breaks_ties_by_lowest_index(n_experts):
    """Equal scores go to the expert with the lowest index."""
    router = make_router(torch.zeros(n_experts, 8), top_k=3)
    assert router(torch.randn(20, 8)).expert_indices.tolist() == [[0, 1, 2]] * 20


def test_choose_experts_breaks_partial_ties_by_lowest_index():
    """A tie for the last place goes to the lowest index too, and a better expert still comes first."""
    scores = torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.2, 0.2, 0.5, 0.1]])
    assert choose_experts(scores, 3).tolist() == [[1, 3, 0], [2, 0, 1]]


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_router_weights_sum_to_one_with_normalize_topk(top_k):
    """With normalize_topk the chosen experts' weights sum to 1 for every token."""
    router, x = random_router(top_k=top_k)
    weights = router(x).expert_weights
    assert_close(weights.sum(dim=-1), torch.ones(50), atol=1e-6, rtol=0)  # float32 rounding
    assert (weights >= 0).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_weights_are_the_raw_probabilities_without_normalize_topk(top_k):
    """Without normalize_topk the weights are the router probabilities of the chosen experts."""
    router, x = random_router(top_k=top_k, normalize_topk=False)
    routing = router(x)
    expected = routing.router_logits.softmax(dim=-1).topk(top_k).values
    assert_close(routing.expert_weights, expected, atol=1e-7, rtol=1e-6)  # the same operations


@pytest.mark.parametrize("top_k", [2, 4])
def test_router_softmax_topk_renormalise_equals_topk_softmax(top_k):
    """Softmax, top-k, renormalise (Mixtral's text) is top-k, softmax (Mixtral's formula)."""
    router, x = random_router(top_k=top_k)
    routing = router(x)
    logits, indices = routing.router_logits.topk(top_k)
    assert torch.equal(routing.expert_indices, indices)
    assert_close(routing.expert_weights, logits.softmax(dim=-1), atol=1e-6, rtol=1e-5)  # float32 rounding


def test_router_stays_in_float32_under_bf16_autocast():
    """Autocast changes nothing: logits, probabilities and weights are float32 and bit for bit the same."""
    router, x = random_router()
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    for actual, wanted in zip(routing, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual, wanted)
    assert routing.router_logits.dtype == routing.expert_weights.dtype == torch.float32


def test_router_computes_bf16_tokens_in_float32():
    """Tokens in bf16 are routed by float32 products of the same values."""
    router, x = random_router()
    routing = router(x.bfloat16())
    assert routing.router_logits.dtype == torch.float32
    assert torch.equal(routing.router_logits, router(x.bfloat16().float()).router_logits)


def test_router_adds_noise_in_training_only():
    """Noise of the stated standard deviation is on the logits in training, and none in evaluation."""
    router, _ = random_router(router_noise=0.5)
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    clean = x @ router.weight.T
    noise = router(x).router_logits - clean
    assert 0.49 < noise.std() < 0.51  # 32,000 draws: 5 standard errors are 0.01
    assert abs(noise.mean()) < 0.015
    assert_close(router.eval()(x).router_logits, clean, atol=1e-5, rtol=0)  # float32 rounding of the product


def test_router_chooses_and_weighs_by_the_noisy_logits():
    """Noise changes choices, and the weights are probabilities of the noisy logits that are returned."""
    router, x = random_router(router_noise=1.0, normalize_topk=False)
    torch.manual_seed(2)
    routing = router(x)
    probs, indices = routing.router_logits.softmax(dim=-1).topk(2)
    assert torch.equal(routing.expert_indices, indices)
    assert_close(routing.expert_weights, probs)
    assert not torch.equal(indices, router.eval()(x).expert_indices)


def test_router_without_noise_draws_no_random_numbers():
    """Without noise a training pass leaves torch's generator where it was."""
    router, x = random_router()
    before = torch.get_rng_state()
    router(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("normalize_topk", "weights"), [(False, [1 / 8, 5 / 8]), (True, [1 / 6, 5 / 6])])
def test_router_bias_changes_the_choice_but_not_the_weights(normalize_topk, weights):
    """The balancing bias decides who is chosen; the weights come from the probabilities alone."""
    router = make_router(torch.eye(3), balance="bias", normalize_topk=normalize_topk)
    router.expert_bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    routing = router(torch.tensor([[1.0, 2.0, 5.0]]).log())
    assert routing.expert_indices.tolist() == [[0, 2]]  # without the bias: 2, 1
    assert_close(routing.expert_weights, torch.tensor([weights]), atol=1e-6, rtol=0)  # float32 rounding
    assert_close(routing.router_probs, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]), atol=1e-6, rtol=0)


def test_router_bias_gets_no_gradient_and_is_not_changed_by_training_passes():
    """Only training's own rule moves the bias: no gradient, no update in forward or backward."""
    router, x = random_router(balance="bias")
    router.expert_bias.copy_(torch.linspace(-1, 1, 8))
    routing = router(x)
    (routing.expert_weights[:, 0].sum() + routing.router_logits.square().sum()).backward()
    assert not router.expert_bias.requires_grad
    assert router.expert_bias.grad is None
    assert router.weight.grad.norm() > 0
    assert torch.equal(router.expert_bias, torch.linspace(-1, 1, 8))


def test_router_bias_is_a_persistent_float32_buffer():
    """The bias is saved with the weights, is not a parameter, and starts at zero."""
    router, _ = random_router(balance="bias")
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert sorted(router.state_dict()) == ["expert_bias", "weight"]
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, torch.zeros(8))


@pytest.mark.parametrize("balance", ["loss", "none"])
def test_router_has_no_bias_without_bias_balancing(balance):
    """Balance by loss or not at all: the state is the weight alone."""
    router, _ = random_router(balance=balance)
    assert router.expert_bias is None
    assert sorted(router.state_dict()) == ["weight"]


def test_router_weights_are_finite_where_the_bias_chooses_experts_of_probability_zero():
    """Experts whose probability underflows to 0 in float32 still get weights that sum to 1."""
    router = make_router(torch.eye(4), balance="bias")
    router.expert_bias.copy_(torch.tensor([-2.0, 0.0, 0.0, 0.0]))
    routing = router(torch.tensor([[200.0, 0.0, 0.0, 0.0]]))
    assert routing.expert_indices.tolist() == [[1, 2]]
    assert_close(routing.expert_weights, torch.tensor([[0.5, 0.5]]), atol=1e-6, rtol=0)  # equal logits
