"""Tiny models and inputs for the model's tests.

Initial weights are ten times the default, so that attention and experts matter to the logits and a broken mask or
a wrong expert is seen, not rounded away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_gpt.config import LossConfig, ModelConfig
from moe_gpt.model.losses import LossTerms, combine_losses, cross_entropy
from moe_gpt.model.moe import MoE
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import ModelOutput, MoEGPT

VOCAB_SIZE = 61

VARIANTS = {
    "balance_by_loss": {},
    "balance_by_bias": {"balance": "bias"},
    "no_balance": {"balance": "none"},
    "dense": {"n_experts": 1, "top_k": 1},
    "one_expert_per_token": {"top_k": 1, "normalize_topk": False},
    "shared_attention": {"attention_sharing": 2},
    "tied_embeddings": {"tie_embeddings": True},
    "grouped_query": {"n_kv_heads": 2},
    "multi_head": {"n_kv_heads": 4},
    "sizes_that_grouped_mm_refuses": {"d_model": 30},
}
"""Settings that every law of the decoder must survive."""


def tiny_config(**changes: object) -> ModelConfig:
    """Return a two-layer config with four experts, top-2."""
    settings: dict = {
        "vocab_size": VOCAB_SIZE,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "head_dim": 8,
        "d_ff": 16,
        "n_experts": 4,
        "max_seq_len": 32,
        "init_std": 0.2,
    }
    return ModelConfig(**(settings | changes))


def tiny_model(seed: int = 0, **changes: object) -> MoEGPT:
    """Return a tiny model in training mode, with large output weights and a balancing bias that changes choices."""
    torch.manual_seed(seed)
    model = MoEGPT(tiny_config(**changes))
    nn.init.normal_(model.output.weight, std=model.config.init_std)
    for router in routers_of(model):
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-0.2, 0.2, len(router.expert_bias)))
    return model


def random_layer(**changes: object) -> MoE:
    """Return one layer whose weights are all large enough to matter."""
    torch.manual_seed(0)
    layer = MoE(tiny_config(**changes))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    """Return token ids of the tiny vocabulary."""
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def routers_of(model: nn.Module) -> list[Router]:
    """Return the routers in layer order."""
    return [module for module in model.modules() if isinstance(module, Router)]


def run_and_record_choices(model: MoEGPT, tokens: Tensor) -> tuple[ModelOutput, Tensor]:
    """Run the model; also return the experts that each layer chose, (L, B, T, K), with no layers for a dense model."""
    chosen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _inputs, routing: chosen.append(routing.expert_indices))
        for router in routers_of(model)
    ]
    output = model(tokens)
    for hook in hooks:
        hook.remove()
    choices = torch.stack(chosen) if chosen else torch.zeros(0, tokens.numel(), 1, dtype=torch.int64)
    return output, choices.unflatten(1, tokens.shape)


def training_loss(output: ModelOutput, targets: Tensor, model: MoEGPT, weights: LossConfig | None = None) -> LossTerms:
    """Return the loss terms as a training step adds them up, with auxiliary weights large enough to be seen."""
    ce = cross_entropy(output.logits, targets)
    stats = output.router_stats
    return combine_losses(
        ce.total / ce.n_valid,
        stats.load_balancing_loss if stats else None,
        stats.router_z_loss if stats else None,
        model.config,
        weights or LossConfig(load_balancing_loss_weight=0.5, router_z_loss_weight=0.1),
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}
