"""Low-rank adapters: what they adapt, what learns, merging, and folders of PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, random_tokens, tiny_model

from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.peft_folder import load_adapters, save_adapters
from moe_gpt.training.adapters import adapters_of, add_adapters, merged

TOKENS = random_tokens(2, 9)
FEW = {name: VARIANTS[name] for name in ("balance_by_loss", "dense", "shared_attention", "grouped_query")}


def adapted(rank: int = 3, alpha: float = 6.0, **changes) -> MoEGPT:
    """Return a tiny model whose adapters do something."""
    settings = {"targets": changes.pop("targets")} if "targets" in changes else {}
    model = tiny_model(**changes)
    add_adapters(model, rank, alpha, **settings)
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.b, std=0.2)
    return model


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attention.qkv"], ["attention.qkv.weight"]),
        (["attention.*"], ["attention.qkv.weight", "attention.out.weight"]),
        (["feed_forward.experts.*"], ["feed_forward.experts.gate_up", "feed_forward.experts.down"]),
        (["feed_forward.router"], ["feed_forward.router.weight"]),
    ],
)
def test_targets_are_what_is_adapted(targets, expected):
    """These tensors of every layer and no others, whatever their shape."""
    names = add_adapters(model := tiny_model(), 2, 4.0, targets)
    assert sorted(names) == sorted(f"blocks.{layer}.{name}" for layer in (0, 1) for name in expected)
    assert set(adapters_of(model)) == set(names)


def test_defaults_leave_the_router_alone():
    """Attention's two matrices, which are not square, and all experts' tensors."""
    names = add_adapters(tiny_model(), 2, 4.0)
    assert len(names) == 8
    assert not any("router" in name or "norm" in name or "embedding" in name for name in names)


@pytest.mark.parametrize("target", ["attention.q_proj", "router", "output", "embedding", "feed_forward.up"])
def test_unknown_targets_are_refused(target):
    """The message names the matrices there are."""
    with pytest.raises(InputError, match=f"{target}.*attention.out, attention.qkv, feed_forward.experts.down"):
        add_adapters(tiny_model(), 2, 4.0, ["attention.*", target])


def test_adapters_are_not_stacked():
    """A second set is refused, and so is a rank of 0."""
    with pytest.raises(InputError, match="merge them first"):
        add_adapters(adapted(), 2, 4.0)
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        add_adapters(tiny_model(), 0, 4.0)


@pytest.mark.parametrize("changes", FEW.values(), ids=FEW)
def test_new_adapters_change_nothing_and_learn_alone(changes):
    """B is 0, so logits are the same bits; then B gets gradients, and what is frozen gets none."""
    model = tiny_model(**changes)
    before = model(TOKENS).logits
    targets = ["attention.*", "feed_forward.*"]
    add_adapters(model, 2, 4.0, targets)
    logits = model(TOKENS).logits
    assert logits.equal(before)
    logits.square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, p in model.named_parameters() if name.endswith((".a", ".b"))}
    assert all(adapter.b.grad.abs().max() > 0 for adapter in adapters_of(model).values())


def test_an_adapted_weight_by_hand():
    """W + alpha/r · B A, for each expert by itself."""
    model = tiny_model()
    plain = model.blocks[0].feed_forward.experts.down.detach().clone()
    add_adapters(model, 2, 6.0)
    adapter = adapters_of(model)["blocks.0.feed_forward.experts.down"]
    torch.nn.init.normal_(adapter.b)
    found = model.blocks[0].feed_forward.experts.down
    for expert in range(4):
        expected = plain[expert] + 3 * adapter.b[expert] @ adapter.a[expert]
        torch.testing.assert_close(found[expert], expected)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_merging_keeps_the_function(changes):
    """Weights are the same bits as the parametrised ones, and so are logits; names are those of an ordinary model."""
    model = adapted(targets=["attention.*", "feed_forward.*"], **changes)
    weights = {name: model.get_submodule(name.rpartition(".")[0]) for name in adapters_of(model)}
    acting = {name: getattr(owner, name.rpartition(".")[2]).detach().clone() for name, owner in weights.items()}
    logits = model(TOKENS).logits
    model = merged(model)
    assert all(model.get_parameter(name).equal(tensor) for name, tensor in acting.items())
    assert model(TOKENS).logits.equal(logits)
    plain = tiny_model(seed=1, **changes)
    plain.load_state_dict(model.state_dict())
    assert plain(TOKENS).logits.equal(logits)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("changes", FEW.values(), ids=FEW)
def test_a_saved_folder_gives_the_same_model(tmp_path, changes):
    """It has the adapters alone, and A and B come back as they were."""
    model = adapted(**changes) if not changes.get("n_experts") else adapted(targets=["*"], **changes)
    save_adapters(model, tmp_path / "adapter")
    plain = tiny_model(**changes)
    assert sorted(load_adapters(plain, tmp_path / "adapter")) == sorted(adapters_of(model))
    for name, adapter in adapters_of(plain).items():
        original = adapters_of(model)[name]
        assert adapter.a.equal(original.a)
        assert adapter.b.equal(original.b)
        assert adapter.scale == original.scale
    assert plain(TOKENS).logits.equal(model(TOKENS).logits)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("targets", [["feed_forward.experts.down"], ["feed_forward.experts.gate_up"]])
def test_a_folder_may_adapt_one_of_the_experts_tensors(tmp_path, targets):
    """PEFT's names depend on whether the other is adapted too."""
    model = adapted(targets=targets)
    save_adapters(model, tmp_path / "adapter")
    plain = tiny_model()
    assert load_adapters(plain, tmp_path / "adapter") == list(adapters_of(model))
    assert plain(TOKENS).logits.equal(model(TOKENS).logits)


def test_parts_with_ranks_of_their_own_are_joined(tmp_path):
    """PEFT learns another A for queries, keys and values; queries alone may be adapted, too."""
    model = adapted(targets=["attention.qkv"])
    save_adapters(model, folder := tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.manual_seed(1)
    tensors = {name: torch.randn_like(x) * 0.2 for name, x in tensors.items() if "k_proj" not in name}
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = tiny_model()
    expected = plain.blocks[0].attention.qkv.weight.detach().clone()
    stem = "base_model.model.model.layers.0.self_attn"
    for name, rows in (("q_proj", slice(0, 32)), ("v_proj", slice(40, 48))):
        expected[rows] += 2 * tensors[f"{stem}.{name}.lora_B.weight"] @ tensors[f"{stem}.{name}.lora_A.weight"]
    load_adapters(plain, folder)
    torch.testing.assert_close(plain.blocks[0].attention.qkv.weight, expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"peft_type": "IA3"}, "plain LoRA.*IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_other_adapters_are_refused(tmp_path, setting, message):
    """The message names the setting and the way out."""
    save_adapters(adapted(), folder := tmp_path / "adapter")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | setting))
    with pytest.raises(InputError, match=f"{message}.*merge_and_unload"):
        load_adapters(tiny_model(), folder)


@pytest.mark.parametrize("changes", [{"n_layers": 1}, {"d_model": 48}, {"n_heads": 2}], ids=str)
def test_adapters_of_another_model_are_refused(tmp_path, changes):
    """One with more layers, or of another width; the model stays as it was."""
    save_adapters(adapted(), folder := tmp_path / "adapter")
    model = tiny_model(**changes)
    with pytest.raises(InputError, match="fit"):
        load_adapters(model, folder)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_peft_cannot_hold_is_not_saved(tmp_path):
    """A router's adapter, and a model without adapters."""
    for model in (adapted(targets=["feed_forward.router"]), tiny_model()):
        with pytest.raises(InputError, match="merge them and save the model"):
            save_adapters(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
