"""Operations of the model: plain definitions and faster versions.

The model calls only the functions below. Each of them chooses an implementation. ``plain`` defines every operation;
``cpu``, ``cpu_attention`` and ``cuda`` have faster implementations. ``dispatch`` groups tokens by expert and sums the
outputs. ``loss`` computes the loss without storing all logits. Read ``plain.py`` first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_gpt.errors import InputError
from moe_gpt.ops import alone, cpu, cpu_attention, cuda, dispatch, loss, mkl, plain, ragged
from moe_gpt.ops.device import compute_dtype, without_autocast
from moe_gpt.ops.plain import IGNORED_TARGET, rotary_angles
from moe_gpt.ops.ragged import KEY_BLOCK, RowGroup, RowPlan
from moe_gpt.ops.visible import Visible

__all__ = [
    "IGNORED_TARGET",
    "KEY_BLOCK",
    "Linear",
    "RowGroup",
    "RowPlan",
    "Visible",
    "as_if_alone",
    "attend",
    "largest_indices",
    "is_alone",
    "linear",
    "linear_cross_entropy",
    "mix_experts",
    "prepare",
    "require_indices",
    "rms_norm",
    "rotary_angles",
    "rotate",
    "swiglu",
    "using",
    "without_autocast",
]

_WAYS = ("plain", "cpu", "cuda")


class _Chosen:
    """The way that ``using`` chose; an attribute, because torch.compile compiles again when one changes."""

    way: str | None = None


_chosen = _Chosen()


@contextlib.contextmanager
def using(way: str) -> Iterator[None]:
    """Make every operation take one way, in the whole process, whatever the device: to test, to teach, to find a bug.

    Args:
        way: ``plain``, the definitions; ``cpu`` or ``cuda``, what the device of that name takes for large tensors,
            plain where it has nothing better.
    """
    if way not in _WAYS:
        raise ValueError(f"way must be plain, cpu or cuda, got {way!r}")
    before, _chosen.way = _chosen.way, way
    try:
        yield
    finally:
        _chosen.way = before


class _Thread(threading.local):
    """What holds for one thread: a server's must not change the numbers of another, nor the other way round."""

    is_alone = False


_thread = _Thread()


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """Make each token's numbers, in this thread, independent of the tokens beside it: the way of ``alone``.

    It changes what float32 on a CPU computes; nothing where a compiler looks on.
    """
    before, _thread.is_alone = _thread.is_alone, True
    try:
        with mkl.products:
            yield
    finally:
        _thread.is_alone = before


def is_alone() -> bool:
    """Whether ``as_if_alone`` holds."""
    return not torch.compiler.is_compiling() and _thread.is_alone


def _is_plain() -> bool:
    return _chosen.way == "plain"


def _is_on_cpu(device: torch.device) -> bool:
    return device.type == "cpu" if _chosen.way is None else _chosen.way == "cpu"


def _takes_custom_gradient(x: Tensor) -> bool:
    if is_alone():
        return False
    return cpu.is_worth_it(x) if _chosen.way is None else _chosen.way == "cpu"


def require_indices(indices: Tensor, end: int, subject: str) -> None:
    """Raise InputError where indices are not int64 or not from 0 to ``end`` - 1; ``subject`` starts the message.

    A device that computes later fails later; inside ``torch.compile`` the error is a RuntimeError.
    """
    if indices.dtype != torch.int64:
        raise InputError(f"{subject} in int64, got {indices.dtype}")
    is_wrong, message = (indices < 0) | (indices >= end), f"{subject} from 0 to {end - 1}"
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~is_wrong.any(), message)
    elif is_wrong.any():
        raise InputError(f"{message}, got {int(indices[is_wrong][0])}")


def linear(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "F D"]) -> Float[Tensor, "*batch F"]:
    """Return x Wᵀ in autocast's type: ``plain.linear``."""
    if is_alone():
        return alone.linear(x, weight)
    if _is_plain() or not cpu.is_one_row(x) or compute_dtype(x) != x.dtype:
        return plain.linear(x, weight)
    return cpu.multiply_one_row(x, weight)


class Linear(nn.Linear):
    """A matrix without a bias, which multiplies by ``linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        """Return x Wᵀ."""
        return linear(x, self.weight)


def rms_norm(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*batch D"]:
    """Return x / rms(x) · weight in x's type: ``plain.rms_norm``."""
    return cpu.rms_norm(x, weight, eps) if _takes_custom_gradient(x) else plain.rms_norm(x, weight, eps)


def rotate(x: Float[Tensor, "B T heads Dh"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T heads Dh"]:
    """Turn each pair (x[i], x[i + Dh/2]) by its position's angle, in x's type: ``plain.rotate``."""
    return cpu.rotate(x, cos, sin) if _takes_custom_gradient(x) else plain.rotate(x, cos, sin)


def swiglu(gate_up: Float[Tensor, "*batch gate_and_up"]) -> Float[Tensor, "*batch gate_and_up//2"]:
    """Return silu(gate) · up: ``plain.swiglu``."""
    return cpu.swiglu(gate_up) if _takes_custom_gradient(gate_up) else plain.swiglu(gate_up)


def prepare(visible: Visible, n_queries: int, device: torch.device) -> Visible:
    """Give a ``Visible`` the form in which ``attend`` wants it: once a forward pass, for all layers."""
    if visible.rows is not None or visible.is_causal(n_queries) or _is_plain():
        return visible
    if visible.document_ids is not None:
        if _is_on_cpu(device) and n_queries > cpu_attention.LONGEST_BY_MATRIX:
            return visible._replace(form=cpu_attention.DocumentSpans(visible.document_ids))
        if device.type == "cuda" and not _is_on_cpu(device):
            return visible._replace(form=cuda.DocumentBlocks(visible.document_ids))
    return visible._replace(form=visible.matrix(n_queries, device))


def attend(
    queries: Float[Tensor, "B H T Dh"],
    keys: Float[Tensor, "B G S Dh"],
    values: Float[Tensor, "B G S Dh"],
    visible: Visible,
) -> Float[Tensor, "B H T Dh"]:
    """Return softmax(q kᵀ / √Dh) v over what each query may see: ``plain.attend``.

    Args:
        queries: of the last T positions.
        keys: of all S positions, fewer heads that the query heads share.
        values: beside the keys.
        visible: from ``prepare``.
    """
    if visible.rows is not None:
        return ragged.attend(queries, keys, values, visible.rows)
    if _is_plain():
        return plain.attend(queries, keys, values, visible.matrix(queries.shape[2], queries.device))
    if _is_on_cpu(queries.device):
        return cpu_attention.attend(queries, keys, values, visible.form, _takes_custom_gradient(queries))
    return cuda.attend(queries, keys, values, visible.form)


def largest_indices(scores: Float[Tensor, "N E"], k: int) -> Int[Tensor, "N k"]:
    """Return where each row's k largest numbers are, the largest first, equal ones in order."""
    return (cpu if _is_on_cpu(scores.device) and not _is_plain() else plain).largest_indices(scores, k)


def mix_experts(
    x: Float[Tensor, "N D"],
    expert_indices: Int[Tensor, "N K"],
    expert_weights: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E twoF D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Return each token's weighted sum over its experts' answers, in the weights' type: ``plain.mix_experts``."""
    if _is_plain():
        return plain.mix_experts(x, expert_indices, expert_weights, gate_up, down)
    if is_alone():
        return alone.mix_experts(x, expert_indices, expert_weights, gate_up, down)
    x = x.to(compute_dtype(x))
    if _is_on_cpu(x.device) and cpu.are_few(expert_indices):
        return cpu.mix_few_tokens(x, expert_indices, expert_weights, gate_up, down)
    alignment = dispatch.segment_alignment(expert_indices.numel(), len(gate_up), x.device, x.dtype)
    plan = dispatch.plan_dispatch(expert_indices, len(gate_up), alignment)
    rows = dispatch.dispatch_tokens(x, plan)
    if _takes_custom_gradient(rows):
        rows = cpu.apply_experts(rows, gate_up, down, plan.segment_ends)
    else:
        weights = gate_up.to(x.dtype), down.to(x.dtype)
        rows = cuda.apply_experts(rows, *weights, plan.segment_ends, swiglu)
    return dispatch.combine_rows(rows, expert_weights, plan)


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Return the sum of -ln p(target) in float32 or more: ``plain.linear_cross_entropy``."""
    if _is_plain():
        return plain.linear_cross_entropy(hidden, weight, targets)
    dtype = compute_dtype(hidden)
    return loss.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets)
