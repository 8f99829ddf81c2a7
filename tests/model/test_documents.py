"""Packed documents: each sees itself only, in whichever form the mask has."""

from __future__ import annotations

import platform
import resource

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from moe_gpt.model import documents
from moe_gpt.model.attention import attend, attend_by_products, causal_mask
from moe_gpt.model.documents import DocumentSpans, document_blocks, document_mask, positions_within


def packed(B: int, T: int, mean_length: int, device: str = "cpu") -> torch.Tensor:
    """Return document ids with random lengths."""
    generator = torch.Generator().manual_seed(T)
    return (torch.rand(B, T, generator=generator) < 1 / mean_length).long().cumsum(1).to(device)


def heads(B: int, H: int, G: int, T: int, device: str = "cpu") -> list[torch.Tensor]:
    """Return queries, keys and values."""
    generator = torch.Generator().manual_seed(H)
    return [torch.randn(B, n, T, 16, generator=generator).to(device) for n in (H, G, G)]


def one_document_at_a_time(queries, keys, values, ids) -> torch.Tensor:
    """The oracle: plain causal attention over each document by itself."""
    result = torch.empty_like(queries)
    for row, row_ids in enumerate(ids):
        for number in row_ids.unique():
            (place,) = torch.where(row_ids == number)
            q, k, v = (x[row : row + 1, :, place] for x in (queries, keys, values))
            mask = causal_mask(len(place), len(place), q.device)[None, None]
            result[row, :, place] = attend_by_products(q, k, v, mask)[0]
    return result


SHAPES = [(4, 1, 200, 30), (4, 2, 130, 1000), (4, 4, 300, 3), (2, 1, 1, 1)]


@pytest.mark.parametrize(("H", "G", "T", "mean_length"), SHAPES)
@pytest.mark.parametrize("make_mask", [document_mask, DocumentSpans, document_blocks])
def test_documents_attend_to_themselves_only(make_mask, H, G, T, mean_length):
    """Each form of the mask gives what each document gives by itself (FlexAttention uncompiled, on a CPU)."""
    ids, qkv = packed(3, T, mean_length), heads(3, H, G, T)
    torch.testing.assert_close(attend(*qkv, make_mask(ids)), one_document_at_a_time(*qkv, ids), atol=1e-5, rtol=0)


def test_long_sequences_take_no_matrix():
    """On a CPU it would grow with the square of their length; gradients flow to each document's own positions."""
    ids = packed(2, 1025, 300)
    mask = document_mask(ids)
    assert isinstance(mask, DocumentSpans)
    assert [sum(lengths) for lengths in mask.lengths()] == [1025, 1025]
    queries, keys, values = heads(2, 2, 1, 1025)
    keys.requires_grad_()
    attend(queries, keys, values, mask)[0, :, ids[0] == 1].square().sum().backward()
    assert ((keys.grad != 0).any(-1)[:, 0] == (ids == 1) * torch.tensor([[True], [False]])).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G", "T", "mean_length"), SHAPES)
def test_documents_attend_to_themselves_only_on_a_gpu(H, G, T, mean_length):
    """Forward and backward, compiled, as training does."""
    ids, qkv = packed(3, T, mean_length, "cuda"), heads(3, H, G, T, "cuda")
    gradients = []
    for result in (lambda x: attend(*x, document_mask(ids)), lambda x: one_document_at_a_time(*x, ids)):
        leaves = [x.clone().requires_grad_() for x in qkv]
        y = result(leaves)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, oracle, atol=2e-2, rtol=2e-2)  # TF32 inside


@pytest.mark.gpu
def test_mask_of_long_sequences_takes_little_memory_on_a_gpu():
    """65,536 positions: the matrix would take 4.3 GB."""
    ids = packed(1, 65_536, 1000, "cuda")
    document_mask(ids)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    document_mask(ids)
    assert torch.cuda.max_memory_allocated() - before < 100e6


@pytest.fixture
def compiled_flex_attention(monkeypatch):
    """FlexAttention compiled as for a GPU, but for this CPU, which has no gradients of it; nothing compiled so far."""
    monkeypatch.setattr(documents, "compiles_flex_attention", lambda device: True)
    torch.compiler.reset()
    counters.clear()
    documents._flex_attention.cache_clear()
    yield
    documents._flex_attention.cache_clear()


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.usefixtures("compiled_flex_attention")
@torch.no_grad()
def test_compiled_blocks_are_right_and_compiled_for_no_new_documents():
    """Mask and attention compile for a few shapes, then for all; never for where the documents end."""
    n_graphs = []
    for B, T, mean_length in ((2, 256, 50), (2, 256, 9), (2, 512, 50), (3, 512, 70), (3, 1024, 70), (4, 1024, 300)):
        ids, qkv = packed(B, T, mean_length), heads(B, 4, 1, T)
        y = attend(*qkv, document_blocks(ids))
        torch.testing.assert_close(y, one_document_at_a_time(*qkv, ids), atol=1e-5, rtol=0)
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs[0] == n_graphs[1] > 0
    assert n_graphs[3] == n_graphs[-1] <= 3 * n_graphs[0]


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(platform.system() != "Linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.usefixtures("compiled_flex_attention")
def test_compiled_mask_of_long_sequences_takes_little_memory():
    """32,768 positions: the matrix would take 1.07 GB."""
    document_blocks(packed(1, 1024, 300))  # what compiling takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    document_blocks(packed(1, 32_768, 1000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_positions_within_documents_by_hand():
    """They count from the first of each, whatever the numbers are."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [7, 3, 3, 3, 9, 9]])
    assert positions_within(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 0, 1]]


@pytest.mark.compile
def test_other_documents_do_not_compile_again():
    """What is compiled knows the shape of the batch and not where its documents end."""
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v, mask: attend(q * 2, k, v, mask) + 1, backend=counter)
    n_frames = []
    for mean_length in (5, 30, 300, 11):
        ids, (q, k, v) = packed(2, 1100, mean_length), heads(2, 4, 1, 1100)
        result = compiled(q, k, v, document_mask(ids))
        torch.testing.assert_close(result, attend(q * 2, k, v, document_mask(ids)) + 1)
        n_frames.append(counter.frame_count)
    assert n_frames[-1] == n_frames[0]
