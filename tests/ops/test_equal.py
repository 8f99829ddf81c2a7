"""Every operation, by every way to compute it, in every type, against its plain form: output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_gpt import ops
from moe_gpt.ops import cpu, cpu_attention, cuda, dispatch, loss, plain
from moe_gpt.ops.visible import Visible

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Sums in another order; relative to the largest number of a tensor."""
CPU = torch.device("cpu")


class Case(NamedTuple):
    """One operation by one way."""

    way: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    make: Callable[[torch.Generator], list[Tensor]]
    """Arguments that get gradients, in float64."""
    is_float32_at_least: bool = False
    """Whether the way computes in float32 even for float64 arguments."""


def normal(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], list[Tensor]]:
    """Return a maker of normal tensors."""
    return lambda generator: [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def angles(n_positions: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (1, T, 1, 4) for heads of width 8."""
    turned = torch.arange(n_positions)[None, :, None, None] * 10.0 ** -torch.arange(4)
    return turned.cos(), turned.sin()


def attention_case(
    way: Callable[..., Tensor], H: int, G: int, T: int, visible: Visible, make_form: Callable[[Visible], Any]
) -> Case:
    """Return a case of attention of three sequences with heads that are views, as the model passes them."""
    S = visible.past + T

    def split(queries: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2) for x in (queries, keys, values)]

    shapes = [(3, T, H, 8), (3, S, G, 8), (3, S, G, 8)]
    return Case(
        lambda *qkv: way(*split(*qkv), make_form(visible)),
        lambda *qkv: plain.attend(*split(*qkv), visible.matrix(T, CPU)),
        normal(*shapes),
    )


def matrix_of(T: int) -> Callable[[Visible], Tensor]:
    """Return what makes the matrix of a ``Visible``."""
    return lambda visible: visible.matrix(T, CPU)


def left_padded(*lengths: int, size: int) -> Tensor:
    """Return a mask (B, S) of sequences that end together."""
    return torch.arange(size) >= size - torch.tensor(lengths)[:, None]


def documents(T: int) -> Visible:
    """Return three sequences of documents with random ends."""
    ids = (torch.rand(3, T, generator=torch.Generator().manual_seed(T)) < 0.1).long().cumsum(1)
    return Visible(document_ids=ids)


def attention_cases() -> dict[str, Case]:
    """Every way to attend that fits, for lengths around a block's and every number of shared heads."""
    cases: dict[str, Case] = {}
    for G in (1, 2, 4):
        for T in (1, 63, 64, 65, 150):
            blocks = lambda q, k, v, form: cpu_attention.attend_in_query_blocks(q, k, v)  # noqa: E731
            cases[f"query blocks, {T} x {G}"] = attention_case(blocks, 4, G, T, Visible(), lambda _: None)
        by_products, of_cuda = cpu_attention.attend_by_products, cuda.attend
        padded = Visible(valid_mask=left_padded(9, 7, 4, size=9))
        later = Visible(past=6)
        for name, visible, T in (("causal", Visible(), 9), ("padded", padded, 9), ("later chunk", later, 4)):
            form = (lambda _: None) if name == "causal" else matrix_of(T)
            cases[f"products, {name} x {G}"] = attention_case(by_products, 4, G, T, visible, form)
            cases[f"kernel, {name} x {G}"] = attention_case(of_cuda, 4, G, T, visible, form)
        one = lambda q, k, v, form: cpu_attention.attend(q, k, v, form, False)  # noqa: E731
        cases[f"one query x {G}"] = attention_case(one, 4, G, 1, Visible(past=8), lambda _: None)
        for T in (1, 40):
            spans = lambda v: cpu_attention.DocumentSpans(v.document_ids)  # noqa: E731
            per_document = cpu_attention.attend_per_document
            cases[f"per document, {T} x {G}"] = attention_case(per_document, 4, G, T, documents(T), spans)
    return cases


def chosen(n_tokens: int, top_k: int, n_experts: int) -> Tensor:
    """Return distinct experts (N, K), unevenly loaded; the last expert gets nothing."""
    scores = torch.rand(n_tokens, n_experts - 1, generator=torch.Generator().manual_seed(n_tokens))
    return (scores * torch.arange(1, n_experts)).topk(top_k).indices


def through_dispatch(apply_experts: Callable[..., Tensor], indices: Tensor, alignment: int) -> Callable[..., Tensor]:
    """Return ``mix_experts`` by sorting tokens and applying experts to segments in a given way."""

    def mix(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        plan = dispatch.plan_dispatch(indices, len(gate_up), alignment)
        rows = apply_experts(dispatch.dispatch_tokens(x, plan), gate_up, down, plan.segment_ends)
        return dispatch.combine_rows(rows, weights, plan)

    return mix


def expert_cases() -> dict[str, Case]:
    """Experts one segment at a time and by grouped products, whatever the sizes, loads and alignment."""
    cases: dict[str, Case] = {}
    for D, F, K, E in ((16, 8, 2, 5), (5, 3, 1, 3), (16, 24, 4, 9)):
        for n_tokens, alignment in ((1, 1), (17, 8), (40, 64)):
            indices = chosen(n_tokens, K, E)
            make = normal((n_tokens, D), (n_tokens, K), (E, 2 * F, D), (E, D, F))
            definition = lambda x, w, g, d, i=indices: plain.mix_experts(x, i, w, g, d)  # noqa: E731
            grouped = lambda r, g, d, ends: cuda.apply_experts(r, g, d, ends, plain.swiglu)  # noqa: E731
            for name, way in (("segments", cpu.apply_experts), ("grouped", grouped)):
                mix = through_dispatch(way, indices, alignment)
                cases[f"{name}, {n_tokens} tokens, top {K} of {E}"] = Case(mix, definition, make)
    return cases


def cross_entropy_cases() -> dict[str, Case]:
    """However many tokens are taken at a time; ignored targets count nowhere."""
    targets = torch.randint(7, (10,), generator=torch.Generator().manual_seed(0))
    targets[[2, 7]] = ops.IGNORED_TARGET
    return {
        f"loss, chunks of {chunk}": Case(
            lambda hidden, weight, chunk=chunk: loss.linear_cross_entropy(hidden, weight, targets, chunk),
            lambda hidden, weight: plain.linear_cross_entropy(hidden, weight, targets),
            normal((10, 6), (7, 6)),
        )
        for chunk in (1, 3, 100)
    }


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("n_experts", [9, 16, 40])
def test_largest_indices_are_those_of_a_sort(k, n_experts):
    """With ties, NaN and infinities among the scores, and rows of nothing else."""
    scores = torch.randint(3, (300, n_experts), generator=torch.Generator().manual_seed(k)).float()
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        scores[row] = value
        scores[10 * row + 10, ::2] = value
    assert torch.equal(cpu.largest_indices(scores, k), plain.largest_indices(scores, k))
    assert torch.equal(ops.largest_indices(scores, k), plain.largest_indices(scores, k))


CASES = {
    "norm": Case(
        lambda x, w: cpu.rms_norm(x, w, 1e-5), lambda x, w: plain.rms_norm(x, w, 1e-5), normal((3, 5, 24), (24,)), True
    ),
    "rotation": Case(
        lambda x: cpu.rotate(x[:, :, :3], *angles(5)),
        lambda x: plain.rotate(x[:, :, :3], *angles(5)),
        normal((2, 5, 4, 8)),
        True,
    ),
    "one row": Case(cpu.multiply_one_row, plain.linear, normal((1, 1, 24), (7, 24))),
    "swiglu": Case(cpu.swiglu, plain.swiglu, normal((2, 7, 24))),
    **attention_cases(),
    **expert_cases(),
    **cross_entropy_cases(),
}


def output_and_gradients(way: Callable[..., Tensor], arguments: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return what a way gives, and the gradient of every argument under a fixed upstream gradient."""
    leaves = [argument.to(dtype).requires_grad_() for argument in arguments]
    y = way(*leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_way_equals_the_plain_form(name, dtype):
    """In output and all gradients, up to sums in another order; and without gradients it gives the same."""
    case = CASES[name]
    arguments = case.make(torch.Generator().manual_seed(0))
    actual = output_and_gradients(case.way, arguments, dtype)
    # bf16 rounds between operations, and a way has fewer of them: the judge is the plain form in float32
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    expected = output_and_gradients(case.plain, [argument.to(dtype) for argument in arguments], exact)
    assert actual[0].dtype in (dtype, torch.float32)
    tolerance = TOLERANCE[torch.float32 if case.is_float32_at_least and dtype == torch.float64 else dtype]
    for ours, theirs in zip(map(Tensor.detach, actual), map(Tensor.detach, expected), strict=True):
        torch.testing.assert_close(
            ours.double(), theirs.double(), atol=tolerance * max(1.0, float(theirs.abs().max())), rtol=tolerance
        )
    with torch.no_grad():
        again = case.way(*[argument.to(dtype) for argument in arguments])
    torch.testing.assert_close(again, actual[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_tokens", "top_k"), [(1, 2), (1, 4), (6, 2), (3, 1)])
@torch.no_grad()
def test_few_tokens_get_the_same_without_sorting(n_tokens, top_k, dtype):
    """Decoding's short cut is the plain mixture, too."""
    indices = chosen(n_tokens, top_k, 6)
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(shape, generator=generator) for shape in ((n_tokens, 16), (6, 16, 16), (6, 16, 8)))
    weights = torch.rand(n_tokens, top_k, generator=generator)
    arguments = [x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype)]
    few, expected = cpu.mix_few_tokens(*arguments), plain.mix_experts(*arguments)
    assert few.dtype == expected.dtype == torch.float32
    tolerance = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(few, expected, atol=tolerance, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((1, 1, 8), torch.float32, True), ((1, 2, 8), torch.float32, False), ((1, 8), torch.bfloat16, False)],
)
def test_only_a_decoded_token_is_one_row(shape, dtype, expected, monkeypatch):
    """In float32 and without gradients; ``linear`` is the plain product in every case."""
    called: list[Tensor] = []
    multiply = cpu.multiply_one_row
    monkeypatch.setattr(cpu, "multiply_one_row", lambda x, w: called.append(x) or multiply(x, w))
    layer, x = ops.Linear(8, 3).to(dtype), torch.randn(shape).to(dtype)
    trained = layer(x)
    assert not called
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained)
        assert bool(called) is expected
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert len(called) == expected


@pytest.mark.parametrize("name", ["query blocks, 65 x 1", "segments, 17 tokens, top 2 of 5", "swiglu"])
def test_custom_gradients_are_those_of_finite_differences(name):
    """In float64, so that an error that a way shares with the plain form would be found."""
    arguments = [argument.requires_grad_() for argument in CASES[name].make(torch.Generator().manual_seed(0))]
    assert torch.autograd.gradcheck(CASES[name].way, arguments, fast_mode=True)
