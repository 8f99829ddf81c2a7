"""The seam: one context manager makes a whole model compute by the plain page, and the model knows nothing of ways."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, gradients_of, random_tokens, tiny_model, training_loss

from moe_gpt import ops
from moe_gpt.inference.generate import generate
from moe_gpt.inference.sampling import SamplingConfig

MODEL = Path(ops.__file__).parents[1] / "model"


@pytest.fixture
def no_other_way(monkeypatch):
    """Take away every way but the plain one."""
    for module in ("cpu", "cpu_attention", "cuda", "dispatch", "loss"):
        monkeypatch.setattr(ops, module, None)


def loss_and_gradients(variant: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss terms of one batch of two documents a sequence, and all gradients."""
    model, tokens = tiny_model(**VARIANTS[variant]), random_tokens(2, 16)
    ids = (torch.arange(16) > 9).long().expand(2, -1)
    terms = training_loss(model(tokens, document_ids=ids), random_tokens(2, 16, seed=2), model)
    ce, _ = model.cross_entropy(tokens, random_tokens(2, 16, seed=2), ids)
    (terms.loss + ce.total).backward()
    return torch.stack([*terms, ce.total]), gradients_of(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_model_trains_by_the_plain_page_alone(variant, request):
    """In a model of any config, and every other way gives the same loss and gradients to float32 rounding."""
    others = []
    for way in ("cpu", "cuda"):
        with ops.using(way):
            others.append(loss_and_gradients(variant))
    others.append(loss_and_gradients(variant))
    request.getfixturevalue("no_other_way")
    with ops.using("plain"):
        plain = loss_and_gradients(variant)
    for other in others:
        torch.testing.assert_close(other, plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_model_decodes_by_the_plain_page_alone(variant, request):
    """Greedy decoding with a cache gives the tokens that the fast ways give."""
    model, greedy = tiny_model(**VARIANTS[variant]), SamplingConfig(temperature=0)
    fast = list(generate(model, [3, 1, 4], 12, greedy))
    request.getfixturevalue("no_other_way")
    with ops.using("plain"):
        assert list(generate(model, [3, 1, 4], 12, greedy)) == fast


def test_using_is_undone_and_refuses_other_names():
    """After an error too; the ways are named."""
    with pytest.raises(ZeroDivisionError), ops.using("plain"), ops.using("cuda"):
        raise ZeroDivisionError
    assert ops._chosen.way is None
    with pytest.raises(ValueError, match="plain, cpu or cuda, got 'gpu'"), ops.using("gpu"):
        pass


@pytest.mark.compile
def test_compiled_code_follows_the_way():
    """A compiled function computes again by the new way after the way was changed."""
    seen = []

    def backend(graph, inputs):
        seen.append("embedding" if not graph else [str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda q: ops.attend(q, q, q, ops.Visible()), backend=backend)
    queries = torch.randn(1, 2, 5, 8)
    fast = compiled(queries)
    with ops.using("cuda"):
        torch.testing.assert_close(compiled(queries), fast, atol=1e-5, rtol=1e-5)
    assert ["scaled_dot_product_attention" in " ".join(targets) for targets in seen] == [False, True]


def test_model_knows_no_device_no_type_and_no_gradient_mode():
    """What depends on them is in ops; nothing in model/ asks."""
    asked = set()
    for file in MODEL.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {"is_cuda", "is_cpu", "is_meta", "is_grad_enabled"}:
                asked.add((file.name, node.attr))
            if isinstance(node, ast.Compare | ast.Match) and {"device", "dtype", "is_compiling"} & {
                part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
            }:
                asked.add((file.name, node.lineno))
    assert asked == set()


def test_model_is_short():
    """It is to be read in an evening: at most 800 lines, no file above 220."""
    lengths = {file.name: len(file.read_text().splitlines()) for file in MODEL.glob("*.py")}
    assert sum(lengths.values()) <= 800
    assert max(lengths.values()) <= 220
