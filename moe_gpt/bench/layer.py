"""One mixture-of-experts layer against a dense feed-forward network: ``moe-gpt bench layer``."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_gpt.bench.contenders import Workload, dense_twin
from moe_gpt.bench.results import Result, tabulate
from moe_gpt.bench.rounds import require, take_turns, timed
from moe_gpt.config import ModelConfig
from moe_gpt.model.experts import Experts, FeedForward
from moe_gpt.model.losses import router_stats
from moe_gpt.model.moe import MoE
from moe_gpt.model.router import Router
from moe_gpt.ops.device import autocast, tune_process

ROUTINGS = ("balanced", "natural", "skewed")
_SKEWED_SHARE = 0.8


def bench_layer(workload: Workload, rounds: int, steps: int, say: Callable[[str], None]) -> list[Result]:
    """Measure forward and backward of one layer on all tokens of the workload, by routing.

    *Balanced* gives every expert the same number of tokens; *natural* is what an untrained router chooses; *skewed*
    sends four of five tokens to the same ``top_k`` experts.
    """
    names = ["dense", *(f"moe_gpt/{routing}" for routing in ROUTINGS)]
    turns = take_turns(names, functools.partial(_make_pass, workload), rounds, steps, warmup=5, at_once=True, say=say)
    m = workload.model
    say(
        f"one layer: d_model {m.d_model}, {m.n_experts} experts top-{m.top_k}, d_ff {m.d_ff}; {workload.batch_tokens} "
        f"tokens, forward and backward; {workload.device}, {workload.precision}"
    )
    require(turns, "dense")
    results: list[Result] = []
    for name in (name for name in names if turns[name].values):
        seconds, peak = statistics.median(turns[name].values), turns[name].peak_memory_bytes
        speed = workload.batch_tokens / seconds
        results.append(
            {"name": f"layer/{name}", "seconds": seconds, "peak_memory_bytes": peak, "tokens_per_second": speed}
        )
    columns = {"": "{name}", "time": "{seconds:seconds}", "dense is": "{ratio:.2f} x"}
    say(tabulate(results, columns, first_over="tokens_per_second"))
    return results


def _make_pass(workload: Workload, name: str) -> Callable[[], float]:
    device = torch.device(workload.device)
    tune_process(device)
    torch.manual_seed(0)
    layer = make_layer(workload.model, name.partition("/")[2]).to(device).train()
    x = torch.randn(workload.n_sequences, workload.seq_len, workload.model.d_model, device=device, requires_grad=True)
    upstream = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def go() -> None:
        with autocast(device, workload.precision):
            y, routing = layer(x)
            router_stats([routing] if routing else [])  # part of what a layer costs in training
        torch.autograd.grad(y, leaves, upstream, allow_unused=True)

    return functools.partial(timed, device, go)


def make_layer(config: ModelConfig, routing: str) -> nn.Module:
    """Return the dense layer where there is no routing, otherwise a MoE whose router chooses as it says."""
    if not routing:
        config = dense_twin(config)
        layer: nn.Module = FeedForward(config)
    else:
        layer = MoE(config, functools.partial(FixedRouter, routing=routing))
    for module in layer.modules():
        if isinstance(module, FeedForward | Experts | Router):
            module.init_weights(config.init_std, config.init_std)
    return layer


class FixedRouter(Router):
    """A router that does all of its work and then chooses as it is told; ``natural`` leaves it its choice."""

    def __init__(self, config: ModelConfig, routing: str) -> None:
        super().__init__(dataclasses.replace(config, balance="none"))
        self.routing = routing

    def scores(self, x: Tensor, router_probs: Tensor) -> Tensor:
        """Return what makes the choice come out."""
        N, E = router_probs.shape
        if self.routing == "natural":
            return router_probs
        first = torch.arange(N, device=x.device) * self.top_k
        if self.routing == "skewed":
            n_alike = int(_SKEWED_SHARE * N)
            first = torch.where(first < n_alike * self.top_k, 0, first)
        chosen = (first[:, None] + torch.arange(self.top_k, device=x.device)) % E
        return torch.zeros_like(router_probs).scatter(1, chosen, 1.0)
