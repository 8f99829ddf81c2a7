"""Where assignments go and come back from: plans by hand, the laws of a plan, capacity."""

import pytest
import torch
from torch.testing import assert_close

from moe_gpt.ops.dispatch import combine_rows, dispatch_tokens, plan_dispatch, segment_alignment

SIZES = [(1, 1, 2, 4), (7, 2, 5, 8), (33, 3, 4, 1), (200, 2, 8, 64)]
"""Tokens, choices, experts, alignment."""


def random_choices(n_tokens: int, top_k: int, n_experts: int, seed: int = 0) -> torch.Tensor:
    """Return (N, K) distinct experts per token, unevenly loaded."""
    scores = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    return (scores * torch.arange(1, n_experts + 1)).topk(top_k).indices


def test_plan_dispatch_of_one_choice_by_hand():
    """Three tokens to experts 1, 0, 1 of 3, aligned to 2: expert 0 has rows 0-1, expert 1 rows 2-3."""
    plan = plan_dispatch(torch.tensor([[1], [0], [1]]), n_experts=3, alignment=2)
    assert plan.segment_ends.tolist() == [2, 4, 4]
    assert plan.row_of_assignment.tolist() == [[2], [0], [3]]
    assert plan.token_of_row.tolist() == [1, 0, 0, 2, 0, 0]  # rows 1, 4 and 5 are filled with token 0
    assert plan.segment_ends.dtype == torch.int32


def test_plan_dispatch_of_two_choices_by_hand():
    """Two tokens to experts (0, 1) and (1, 0): each expert sees token 0, then token 1."""
    plan = plan_dispatch(torch.tensor([[0, 1], [1, 0]]), n_experts=2, alignment=1)
    assert plan.segment_ends.tolist() == [2, 4]
    assert plan.row_of_assignment.tolist() == [[0, 2], [3, 1]]
    assert plan.token_of_row.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts", "alignment"), SIZES)
def test_plan_dispatch_preserves_token_order_within_an_expert(n_tokens, top_k, n_experts, alignment):
    """Token order is preserved: an expert's rows hold its tokens from first to last."""
    choices = random_choices(n_tokens, top_k, n_experts)
    plan = plan_dispatch(choices, n_experts, alignment)
    for expert in range(n_experts):
        token, choice = torch.where(choices == expert)  # in token order
        rows = plan.row_of_assignment[token, choice]
        assert (rows.diff() == 1).all()
        assert torch.equal(plan.token_of_row[rows], token)


@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts", "alignment"), SIZES)
def test_plan_dispatch_gives_every_assignment_a_row_of_its_own_in_its_experts_segment(
    n_tokens, top_k, n_experts, alignment
):
    """No two assignments share a row, and each row lies in the segment of the expert that was chosen."""
    choices = random_choices(n_tokens, top_k, n_experts)
    plan = plan_dispatch(choices, n_experts, alignment)
    rows = plan.row_of_assignment
    assert len(rows.unique()) == n_tokens * top_k
    ends = plan.segment_ends.long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    assert (rows >= starts[choices]).all()
    assert (rows < ends[choices]).all()


@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts", "alignment"), SIZES)
def test_plan_dispatch_aligns_segments_without_waste(n_tokens, top_k, n_experts, alignment):
    """Each segment is its expert's count rounded up to a multiple of the alignment."""
    choices = random_choices(n_tokens, top_k, n_experts)
    plan = plan_dispatch(choices, n_experts, alignment)
    sizes = plan.segment_ends.diff(prepend=torch.zeros(1, dtype=torch.int32))
    counts = torch.tensor([(choices == expert).sum() for expert in range(n_experts)])
    assert (sizes % alignment == 0).all()
    waste = sizes - counts
    assert ((waste >= 0) & (waste < alignment)).all()


@pytest.mark.parametrize(("n_tokens", "n_experts", "alignment"), [(9, 3, 4), (64, 4, 64), (65, 2, 64), (5, 8, 1)])
def test_plan_dispatch_has_the_same_number_of_rows_for_every_routing(n_tokens, n_experts, alignment):
    """The number of rows depends on sizes alone and is enough for the most uneven and the most even routing."""
    routings = {
        "all to the first": torch.zeros(n_tokens, 1, dtype=torch.int64),
        "all to the last": torch.full((n_tokens, 1), n_experts - 1),
        "in turn": torch.arange(n_tokens)[:, None] % n_experts,
        "one each, then the last": torch.arange(n_tokens).clamp(max=n_experts - 1)[:, None],
    }
    plans = [plan_dispatch(choices, n_experts, alignment) for choices in routings.values()]
    assert len({len(plan.token_of_row) for plan in plans}) == 1
    assert all(plan.segment_ends[-1] <= len(plan.token_of_row) for plan in plans)


@pytest.fixture
def float32_by_mkl():
    """Float32 products as PyTorch sets them, whatever this CPU would take."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_segments_are_aligned_by_what_experts_get(float32_by_mkl):
    """To 64 rows, or 8 for MKL's products, unless few rows would make most of them padding."""
    cpu, sizes = torch.device("cpu"), (4096, 1023, 512, 32, 16, 8)
    assert [segment_alignment(n, 2, cpu, torch.bfloat16) for n in sizes] == [64, 32, 32, 2, 1, 1]
    assert [segment_alignment(n, 2, cpu, torch.float32) for n in sizes] == [8, 8, 8, 2, 1, 1]
    assert [segment_alignment(n, 2, torch.device("cuda"), torch.bfloat16) for n in (4096, 2)] == [64, 8]
    torch.set_float32_matmul_precision("medium")
    assert segment_alignment(4096, 2, cpu, torch.float32) == 64


@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts", "alignment"), SIZES)
def test_dispatch_and_combine_with_weights_of_sum_one_is_the_identity(n_tokens, top_k, n_experts, alignment):
    """Experts that do nothing return every token as it was, and its gradient too: nothing is lost on the way."""
    plan = plan_dispatch(random_choices(n_tokens, top_k, n_experts), n_experts, alignment)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_tokens, 6, generator=generator, requires_grad=True)
    weights = torch.rand(n_tokens, top_k, generator=generator).softmax(dim=-1)
    y = combine_rows(dispatch_tokens(x, plan), weights, plan)
    upstream = torch.randn(n_tokens, 6, generator=generator)
    y.backward(upstream)
    assert_close(y, x, atol=1e-6, rtol=1e-5)  # float32 rounding of weights that sum to 1
    assert_close(x.grad, upstream, atol=1e-6, rtol=1e-5)


def test_dispatch_tokens_copies_filling_rows_that_change_no_gradient():
    """Rows between segments are copies of the first token, and what flows back into them goes nowhere."""
    plan = plan_dispatch(torch.tensor([[1], [0], [1]]), n_experts=3, alignment=2)
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    rows = dispatch_tokens(x, plan)
    assert rows.flatten().tolist() == [2, 1, 1, 3, 1, 1]
    rows.backward(torch.tensor([[1.0], [100.0], [10.0], [20.0], [100.0], [float("nan")]]))
    assert x.grad.flatten().tolist() == [10, 1, 20]


def test_combine_rows_ignores_what_is_in_the_filling_rows():
    """Rows beyond the segments may hold anything: they change no output and get a zero gradient."""
    plan = plan_dispatch(torch.tensor([[1], [0], [1]]), n_experts=3, alignment=2)
    nan = float("nan")
    rows = torch.tensor([[2.0], [nan], [1.0], [3.0], [nan], [nan]], requires_grad=True)
    y = combine_rows(rows, torch.tensor([[0.5], [1.0], [2.0]]), plan)
    y.sum().backward()
    assert y.flatten().tolist() == [0.5, 2.0, 6.0]
    assert rows.grad.flatten().tolist() == [1.0, 0.0, 0.5, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "weights", "expected"),
    [([256.0, 1.0, 1.0], [1.0, 1.0, 1.0], 258), ([-256.0, 256.0, 0.0], [1.0, 257 / 256, 1.0], 1)],
)
def test_combine_rows_weighs_and_sums_in_float32(rows, weights, expected):
    """In bf16 256 + 1 + 1 would be 256 and the weight 257/256 would be 1; the result is float32."""
    plan = plan_dispatch(torch.tensor([[0, 1, 2]]), n_experts=3, alignment=1)
    y = combine_rows(torch.tensor(rows, dtype=torch.bfloat16)[:, None], torch.tensor([weights]), plan)
    assert y.dtype == torch.float32
    assert y.item() == expected


def test_dispatch_tokens_sums_gradients_in_float32():
    """A bf16 token's gradient is the float32 sum over its rows: 256 + 1 + 1 is 258."""
    plan = plan_dispatch(torch.tensor([[0, 1, 2]]), n_experts=3, alignment=1)
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dispatch_tokens(x, plan).backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert x.grad.item() == 258
