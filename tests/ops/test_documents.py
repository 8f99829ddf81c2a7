"""Packed documents: each sees itself only, in whichever form the mask has."""

from __future__ import annotations

import platform
import resource

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from moe_gpt import ops
from moe_gpt.ops import Visible, cpu_attention, cuda, plain
from moe_gpt.ops.cpu_attention import DocumentSpans
from moe_gpt.ops.cuda import DocumentBlocks
from moe_gpt.ops.visible import positions_within


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
            result[row, :, place] = plain.attend(q, k, v, Visible().matrix(len(place), q.device))[0]
    return result


SHAPES = [(4, 1, 200, 30), (4, 2, 130, 1000), (4, 4, 300, 3), (2, 1, 1, 1), (2, 1, 1025, 300)]


def attend(queries, keys, values, ids) -> torch.Tensor:
    """Attend as the model does, in the form that suits the device and the length."""
    visible = ops.prepare(Visible(document_ids=ids), ids.shape[1], ids.device)
    return ops.attend(queries, keys, values, visible)


@pytest.mark.parametrize(("H", "G", "T", "mean_length"), SHAPES)
@pytest.mark.parametrize("way", ["plain", "cpu", "cuda"])
def test_documents_attend_to_themselves_only(way, H, G, T, mean_length):
    """Each form of the mask gives what each document gives by itself (FlexAttention uncompiled, on a CPU)."""
    ids, qkv = packed(3, T, mean_length), heads(3, H, G, T)
    expected = one_document_at_a_time(*qkv, ids)
    with ops.using(way):
        torch.testing.assert_close(attend(*qkv, ids), expected, atol=1e-5, rtol=0)
    for y in (cpu_attention.attend(*qkv, DocumentSpans(ids), True), cuda.attend(*qkv, DocumentBlocks(ids))):
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_long_sequences_take_no_matrix():
    """On a CPU it would grow with the square of their length; gradients flow to each document's own positions."""
    ids = packed(2, 1025, 300)
    form = ops.prepare(Visible(document_ids=ids), 1025, ids.device).form
    assert isinstance(form, DocumentSpans)
    assert [sum(lengths) for lengths in form.lengths()] == [1025, 1025]
    queries, keys, values = heads(2, 2, 1, 1025)
    keys.requires_grad_()
    attend(queries, keys, values, ids)[0, :, ids[0] == 1].square().sum().backward()
    assert ((keys.grad != 0).any(-1)[:, 0] == (ids == 1) * torch.tensor([[True], [False]])).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G", "T", "mean_length"), SHAPES)
def test_documents_attend_to_themselves_only_on_a_gpu(H, G, T, mean_length):
    """Forward and backward, compiled, as training does."""
    ids, qkv = packed(3, T, mean_length, "cuda"), heads(3, H, G, T, "cuda")
    gradients = []
    for result in (lambda x: attend(*x, ids), lambda x: one_document_at_a_time(*x, ids)):
        leaves = [x.clone().requires_grad_() for x in qkv]
        y = result(leaves)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, oracle, atol=2e-2, rtol=2e-2)  # TF32 inside


@pytest.mark.gpu
def test_mask_of_long_sequences_takes_little_memory_on_a_gpu():
    """65,536 positions: the matrix would take 4.3 GB."""
    ids = packed(1, 65_536, 1000, "cuda")
    DocumentBlocks(ids)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    DocumentBlocks(ids)
    assert torch.cuda.max_memory_allocated() - before < 100e6


@pytest.fixture
def nothing_compiled():
    """FlexAttention compiles for this CPU, too, which has no gradients of it; nothing is compiled so far."""
    torch.compiler.reset()
    counters.clear()
    cuda._flex_attention.cache_clear()
    yield
    cuda._flex_attention.cache_clear()


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.usefixtures("nothing_compiled")
@torch.no_grad()
def test_compiled_blocks_are_right_and_compiled_for_no_new_documents():
    """Mask and attention compile for a few shapes, then for all; never for where the documents end."""
    n_graphs = []
    for B, T, mean_length in ((2, 256, 50), (2, 256, 9), (2, 512, 50), (3, 512, 70), (3, 1024, 70), (4, 1024, 300)):
        ids, qkv = packed(B, T, mean_length), heads(B, 4, 1, T)
        y = cuda.attend(*qkv, DocumentBlocks(ids, is_compiled=True))
        torch.testing.assert_close(y, one_document_at_a_time(*qkv, ids), atol=1e-5, rtol=0)
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs[0] == n_graphs[1] > 0
    assert n_graphs[3] == n_graphs[-1] <= 3 * n_graphs[0]


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(platform.system() != "Linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_mask_of_long_sequences_takes_little_memory():
    """32,768 positions: the matrix would take 1.07 GB."""
    DocumentBlocks(packed(1, 1024, 300), is_compiled=True)  # what compiling takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    DocumentBlocks(packed(1, 32_768, 1000), is_compiled=True)
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

    def attend_twice_as_sharply(q, k, v, form):
        return cpu_attention.attend(q * 2, k, v, form, False) + 1

    compiled = torch.compile(attend_twice_as_sharply, backend=counter)
    n_frames = []
    for mean_length in (5, 30, 300, 11):
        ids, qkv = packed(2, 1100, mean_length), heads(2, 4, 1, 1100)
        result = compiled(*qkv, DocumentSpans(ids))
        torch.testing.assert_close(result, attend_twice_as_sharply(*qkv, DocumentSpans(ids)))
        n_frames.append(counter.frame_count)
    assert n_frames[-1] == n_frames[0]
