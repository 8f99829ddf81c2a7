"""A group of one rank trains as no group does: on a CPU with gloo, and on a GPU with NCCL, where one is enough."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import free_port
from tiny_models import tiny_config

from moe_gpt.config import ModelConfig, ParallelConfig, RunConfig
from moe_gpt.distributed.cut import Flat, Holding, add_over_ranks, gather_moved, local_part
from moe_gpt.distributed.experts import spread_experts
from moe_gpt.distributed.layout import Layout
from moe_gpt.distributed.sharding import Meshes, shard
from moe_gpt.distributed.tensor import share_products
from moe_gpt.model.transformer import MoEGPT

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> Iterator[str]:
    """A device, and the group of one rank on it."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[request.param]
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield request.param
    dist.destroy_process_group()


def gradients(model: MoEGPT, tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a forward and backward pass, and every gradient, whole."""
    ce, stats = model.cross_entropy(tokens[:, :-1], tokens[:, 1:].contiguous())
    loss = ce.total + stats.load_balancing_loss.sum()
    loss.backward()
    add_over_ranks(model.parameters())
    gather_moved(model.parameters())
    return loss.item(), {name: local_part(p.grad).cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "zero"), [("plain", 0), ("plain", 1), ("fsdp", 2), ("fsdp", 3), ("products", 1), ("experts", 1)]
)
def test_a_group_of_one_rank_trains_as_no_group(device, kind, zero):
    """With plain sums, with FSDP2, with shared products, and with experts whose tokens are exchanged."""
    config: ModelConfig = tiny_config(max_seq_len=256)
    torch.manual_seed(0)
    alone = MoEGPT(config).to(device)
    grouped = copy.deepcopy(alone)
    run, meshes = RunConfig(model=config, parallel=ParallelConfig(zero=zero)), Meshes(Layout(zero=zero), device)
    if kind == "products":
        share_products(grouped, meshes.tensor)
    elif kind == "experts":
        spread_experts(grouped, meshes.tensor)
    elif kind == "fsdp":
        shard(grouped, run, Layout(zero=zero), meshes)
    else:
        for parameter in grouped.parameters():
            mesh, shape = meshes.tensor, tuple(parameter.shape)
            parameter.holding = Holding(shape, moves=Flat(mesh, shape)) if zero else Holding(shape, copies=mesh)
    tokens = torch.randint(config.vocab_size, (2, 17), device=device)
    (loss, wanted), (other, found) = gradients(alone, tokens), gradients(grouped, tokens)
    assert other == pytest.approx(loss, rel=1e-6)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-8), name
