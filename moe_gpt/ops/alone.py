"""The way in which the numbers of a token do not depend on the tokens beside it, bit for bit, for float32 on a CPU.

A library of matrix products chooses a kernel by the number of rows, and kernels add in different orders. MKL makes the
same bits of a row from some number of rows on. So products get ``fewest_rows`` at least, and the answers of a token's
experts are added in the order of its choices (compare https://arxiv.org/abs/2408.05148 on why batches change bits).
``tests/inference/test_engine.py`` holds the law; it is not proven for other libraries and processors.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe_gpt.ops import plain
from moe_gpt.ops.ragged import align, fewest_rows


def linear(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "F D"]) -> Float[Tensor, "*batch F"]:
    """Return ``plain.linear`` of rows that do not depend on each other."""
    n_rows = x.shape[:-1].numel()
    x, weight = align(x), align(weight)
    if n_rows >= fewest_rows():
        return F.linear(x, weight)
    rows = _fill(x.reshape(n_rows, x.shape[-1]))
    return F.linear(rows, weight)[:n_rows].view(*x.shape[:-1], len(weight))


def _fill(x: Float[Tensor, "n D"]) -> Float[Tensor, "fewest D"]:
    """Append rows that nobody reads; repeating the only row is the quickest way."""
    return x.expand(fewest_rows(), -1) if len(x) == 1 else F.pad(x, (0, 0, 0, fewest_rows() - len(x)))


def mix_experts(
    x: Float[Tensor, "N D"],
    expert_indices: Int[Tensor, "N K"],
    expert_weights: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E twoF D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Return ``plain.mix_experts`` of tokens that do not depend on each other. Only the chosen experts are visited."""
    if len(x) == 1:  # sorting one token would take longer than its experts
        return _mix_one(_fill(x), expert_indices[0].tolist(), expert_weights[0], gate_up, down)
    K, expert_of = expert_indices.shape[1], expert_indices.flatten().tolist()
    order = sorted(range(len(expert_of)), key=expert_of.__getitem__)
    token_of_row: list[int] = []
    row_of_assignment = [0] * len(order)
    experts, lengths = [], []
    for expert, assignments in groupby(order, key=expert_of.__getitem__):
        start = len(token_of_row)
        for assignment in assignments:
            row_of_assignment[assignment] = len(token_of_row)
            token_of_row.append(assignment // K)
        missing = fewest_rows() - (len(token_of_row) - start)
        token_of_row += [0] * missing  # rows whose answers nobody reads
        experts.append(expert)
        lengths.append(len(token_of_row) - start)
    first, second = gate_up.unbind(), down.unbind()
    parts = x[torch.tensor(token_of_row)].split(lengths)
    hidden = torch.cat([F.linear(part, first[expert]) for part, expert in zip(parts, experts, strict=True)])
    parts = plain.swiglu(hidden).split(lengths)
    answers = torch.cat([F.linear(part, second[expert]) for part, expert in zip(parts, experts, strict=True)])
    weighted = answers[torch.tensor(row_of_assignment)].view(*expert_indices.shape, -1) * expert_weights[..., None]
    total, *others = weighted.unbind(1)
    for answer in others:
        total = total + answer
    return total


def _mix_one(rows: Tensor, experts: list[int], weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return what ``mix_experts`` returns of one token, given in ``fewest_rows`` equal rows: the same bits."""
    first, *others = [plain.swiglu(rows @ gate_up[expert].t()) @ down[expert].t() for expert in experts]
    total = first[:1] * weights[0]
    for answer, weight in zip(others, weights[1:], strict=True):
        total = total + answer[:1] * weight
    return total
