"""The experts that the tokens of a text chose: a table and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas
import torch
from matplotlib.figure import Figure

from moe_gpt.errors import InputError
from moe_gpt.model.transformer import evaluating
from moe_gpt.ops.device import autocast

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel


@torch.inference_mode()
def find_routes(loaded: LanguageModel, text: str) -> pandas.DataFrame:
    """Return what ``LanguageModel.route`` explains."""
    ids = loaded.encode(text)
    if loaded.config.is_dense:
        raise InputError("a dense model has no router: model.n_experts is 1")
    if not 0 < len(ids) <= loaded.config.max_seq_len:
        raise InputError(f"the text must have from 1 to {loaded.config.max_seq_len} tokens, got {len(ids)}")
    device = loaded.model.embedding.weight.device
    with evaluating(loaded.model), autocast(device, loaded.precision):
        _, routings = loaded.model.hidden_states(torch.tensor([ids], device=device))
    names = [loaded.require_tokenizer().decode([token]) for token in ids]
    rows = [
        (position, names[position], layer, choice, expert, weight)
        for layer, routing in enumerate(routings)
        for position, (experts, weights) in enumerate(
            zip(routing.expert_indices.tolist(), routing.expert_weights.tolist(), strict=True)
        )
        for choice, (expert, weight) in enumerate(zip(experts, weights, strict=True))
    ]
    return pandas.DataFrame(rows, columns=["position", "token", "layer", "choice", "expert", "weight"])


def draw_route(table: pandas.DataFrame) -> Figure:
    """Draw what ``LanguageModel.route`` returns; ``LanguageModel.plot_route`` explains the picture."""
    first = table[table["choice"] == 0]
    experts = first.pivot(index="layer", columns="position", values="expert")
    weights = first.pivot(index="layer", columns="position", values="weight")
    n_layers, n_tokens = experts.shape
    figure = Figure(figsize=(max(4.0, 0.45 * n_tokens + 1), 0.45 * n_layers + 1.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        experts.to_numpy() % 20, alpha=weights.to_numpy().clip(0.2, 1), cmap="tab20", vmin=0, vmax=20, aspect="auto"
    )
    for layer in range(n_layers):
        for position in range(n_tokens):
            axes.text(position, layer, str(experts.iat[layer, position]), ha="center", va="center", fontsize=8)
    tokens = first[first["layer"] == 0]["token"].map(lambda token: token.replace("\n", "↵").replace(" ", "␣"))
    axes.set_xticks(range(n_tokens), tokens, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(n_layers))
    axes.invert_yaxis()
    axes.set(xlabel="token", ylabel="layer", title="First expert of each token")
    return figure
