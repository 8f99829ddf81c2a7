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
from moe_gpt.distributed.layout import Layout
from moe_gpt.distributed.sharding import Meshes, cut_of, shard, spread_experts, whole
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
    return loss.item(), {name: whole(p.grad, p).cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "zero"), [("plain", 0), ("plain", 1), ("plain", 3), ("tensor", 3), ("experts", 3)])
def test_a_group_of_one_rank_trains_as_no_group(device, kind, zero):
    """Sharded, with shared products, and with experts whose tokens are exchanged."""
    config: ModelConfig = tiny_config(max_seq_len=256)
    torch.manual_seed(0)
    alone = MoEGPT(config).to(device)
    grouped = copy.deepcopy(alone)
    run, layout = RunConfig(model=config, parallel=ParallelConfig(zero=zero)), Layout(zero=zero)
    meshes = Meshes(layout, device)
    cuts = share_products(grouped, meshes.tensor) if kind == "tensor" else {}
    if kind == "experts":
        meshes.experts = meshes.everything
        spread_experts(grouped, meshes)
    else:
        shard(grouped, run, layout, meshes)
    for name, parameter in grouped.named_parameters():
        parameter.cut = cuts.get(name)
    assert (cut_of(grouped.embedding.weight) is not None) == (kind == "tensor")
    tokens = torch.randint(config.vocab_size, (2, 17), device=device)
    (loss, wanted), (other, found) = gradients(alone, tokens), gradients(grouped, tokens)
    assert other == pytest.approx(loss, rel=1e-6)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-8), name
