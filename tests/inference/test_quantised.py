"""Quantised weights: the formats by hand, kernels against restored matrices, rows alone and together, folders."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import whole_run
from tiny_models import VARIANTS, random_tokens, tiny_model
from torch import Tensor
from torch.testing import assert_close

import moe_gpt
from moe_gpt import ops
from moe_gpt.commands.export import ExportOptions, export
from moe_gpt.errors import InputError
from moe_gpt.inference import quantised
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.quantised import KINDS, Quantised, kind_of, quantise, round_weight, weight_bytes
from moe_gpt.inference.request import Request
from moe_gpt.interop import hugging_face, quantised_folder
from moe_gpt.interop.quantised_folder import SETTINGS, WEIGHTS, Settings
from moe_gpt.model.experts import Experts
from moe_gpt.model.router import Routing
from moe_gpt.ops import plain

EXACT = torch.tensor([[-8.0, *range(-7, 8)] * 2])
"""A group whose 4-bit numbers are exact: the scale is 1, the zero 0."""


def matrices(kind: str, *shape: int) -> tuple[Quantised, Tensor]:
    """Return random matrices in a format, and what their numbers mean, in float32."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = Quantised(*round_weight(weight, kind), shape[-1])
    restored = torch.stack([found.restore(i)[: shape[-2], : shape[-1]].float() for i in range(found.n_matrices)])
    return found, restored


def random_rows(n: int, width: int) -> Tensor:
    """Return rows in bfloat16."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(2)).bfloat16()


@torch.no_grad()
def quantised_experts(kind: str) -> tuple[Experts, Tensor, Routing]:
    """Return experts with weights of a kind, and a routing of 15 tokens that leaves out the last expert."""
    model = tiny_model().eval()
    quantise(model, kind)
    layer, x = model.blocks[0].feed_forward, random_rows(15, 32).float()
    routing = layer.router(x)
    return layer.experts, x, routing._replace(expert_indices=routing.expert_indices % 3)


def test_int4_by_hand():
    """Even columns lie in the low half of a byte; a group of the numbers from -8 to 7 is exact."""
    numbers, scales = round_weight(EXACT, "int4")
    assert numbers.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    assert scales.tolist() == [[[1.0, 0.0]]]


def test_int8_by_hand():
    """The largest number of a row becomes 127, its scale is a 127th of it, and columns are filled with zeros."""
    numbers, scales = round_weight(torch.tensor([[254.0, -254.0, 3.0], [0.5, 0.25, 0.0]]), "int8")
    assert numbers.shape == (2, 32)
    assert numbers[0, :4].tolist() == [127, -127, 2, 0]  # 1.5 is rounded to the even neighbour
    assert numbers[1, :3].tolist() == [127, 64, 0]
    assert_close(scales.float(), torch.tensor([2.0, 0.5 / 127]), rtol=2**-8, atol=0)  # bfloat16


@pytest.mark.parametrize(("kind", "levels"), [("int8", 254), ("int4", 15)])
def test_numbers_are_the_nearest(kind, levels):
    """A weight is off by half a step at most: a row's range over 254 of int8, a group's over 15 of int4."""
    weight = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(1))
    restored = matrices(kind, 3, 64, 96)[1]
    groups = weight.unflatten(-1, (1, -1) if kind == "int8" else (-1, 32))
    least, most = groups.aminmax(dim=-1, keepdim=True)
    size = (2 * torch.maximum(-least, most) if kind == "int8" else most - least) / levels
    error = (restored.view_as(groups) - groups).abs()
    assert (error <= size / 2 + 2**-7 * groups.abs().amax(-1, keepdim=True)).all()  # bfloat16 rounds scale and weight
    assert error.mean() > 0.15 * size.mean()  # a step is that wide


@pytest.mark.parametrize("shape", [(64, 64), (60, 44), (33, 31), (3, 96, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_the_restored_product(kind, shape):
    """Of few rows and of many, for widths that kernels refuse too, to the rounding of bfloat16."""
    found, restored = matrices(kind, *shape)
    x = random_rows(5, shape[-1])
    for found.few_rows in (math.inf, 0):
        for index, weight in enumerate(restored.view(-1, *shape[-2:])):
            y = found(x.view(1, 5, -1), index)[0]
            assert y.dtype == torch.bfloat16
            largest = x.float().abs() @ weight.abs().T
            assert ((y.float() - x.float() @ weight.T).abs() <= 2**-7 * largest).all()


def test_a_cpu_whose_kernel_is_unknown_restores(monkeypatch):
    """The numbers mean the same, whatever the layout."""
    x, expected = random_rows(5, 64), matrices("int4", 96, 64)[1]
    for block in ((64, False), (32, False)):
        monkeypatch.setattr(quantised, "int4_block", lambda block=block: block)
        found, restored = matrices("int4", 96, 64)
        assert torch.equal(restored, expected)
        assert_close(found(x), x @ expected[0].bfloat16().T, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_among_others(kind):
    """By the kernel, which computes however many rows there are where tokens must not depend on each other."""
    found, x = matrices(kind, 64, 64)[0], random_rows(200, 64)
    with ops.as_if_alone():
        assert torch.equal(torch.cat([found(row[None]) for row in x]), found(x))
    assert found.few_rows < len(x)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_to_an_engine_get_the_bits_that_they_get_alone(kind):
    """The law of the engine holds for quantised weights, too."""
    model = tiny_model().eval()
    quantise(model, kind)
    requests = [
        Request(prompt=random_tokens(n, seed=n).tolist(), max_new_tokens=4, seed=n, n_logprobs=2) for n in range(1, 28)
    ]

    def answers(n_rows: int, together: list[Request]) -> list[tuple]:
        engine = Engine(model, n_rows=n_rows, chunk=32, tokens_per_step=500)
        ids = [engine.add(request) for request in together]
        events = sorted(engine.run(), key=lambda event: ids.index(event.request_id))
        return [(event.token, event.finish, event.score, event.experts.indices()) for event in events]

    alone = [event for request in requests for event in answers(1, [request])]
    assert answers(27, requests) == alone


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_experts_equal_the_plain_definition_and_do_not_depend_on_other_tokens(kind):
    """Restored weights give the same to bfloat16; a token's bits are those of the token alone."""
    experts, x, routing = quantised_experts(kind)
    y = experts(x, routing)
    weights = (
        torch.stack([part.restore(i)[: part.n_rows, : part.n_columns].float() for i in range(4)])
        for part in (experts.gate_up, experts.down)
    )
    expected = plain.mix_experts(x, routing.expert_indices, routing.expert_weights, *weights)
    assert_close(y, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    alone = [experts(x[i : i + 1], type(routing)(*(part[i : i + 1] for part in routing))) for i in range(len(x))]
    assert torch.equal(torch.cat(alone), y)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_no_token_chose_are_not_visited(kind):
    """Their weights may be anything."""
    experts, x, routing = quantised_experts(kind)
    before = experts(x, routing)
    experts.gate_up.scales[3] = torch.nan
    assert torch.equal(experts(x, routing), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_quantised_models_predict_nearly_the_same(variant, kind):
    """Router, norms, embedding and output matrix keep their bits; the rest becomes smaller and nearly agrees."""
    tokens = random_tokens(2, 32)
    whole, few = (tiny_model(**VARIANTS[variant]).eval() for _ in range(2))
    quantise(few, kind)
    kept = dict(few.named_parameters())
    assert {name.split(".")[-2] for name in kept} <= {
        *("embedding", "output", "final_norm", "attention_norm", "feed_forward_norm", "router")
    }
    assert all(torch.equal(tensor, kept[name]) for name, tensor in whole.named_parameters() if name in kept)
    assert kind_of(few) == kind
    assert weight_bytes(few) < weight_bytes(whole)
    expected = whole(tokens).logits.log_softmax(-1)
    difference = (few(tokens).logits.log_softmax(-1).exp() - expected.exp()).abs().sum(-1).mean()
    assert difference < (0.1 if kind == "int8" else 0.3)  # of 2 at most, for weights that are ten times as large


def test_int4_keeps_more_bits_where_the_loss_needs_them():
    """Attention and down have 8 bits."""
    model = tiny_model().eval()
    quantise(model, "int4")
    formats = {name.split(".")[-1]: part.kind for name, part in model.named_modules() if isinstance(part, Quantised)}
    assert formats == {"qkv": "int8", "out": "int8", "gate_up": "int4", "down": "int8"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_gives_the_bits_of_the_model_in_memory(variant, kind, tmp_path):
    """Saving leaves the model as it is; what is loaded computes what ``quantise`` makes of it."""
    model, tokens = tiny_model(**VARIANTS[variant]).eval(), random_tokens(2, 32)
    quantised_folder.save(tmp_path / "saved", model, Settings(kind=kind, model=model.config), None, tmp_path)
    loaded, tokenizer, settings = quantised_folder.load(tmp_path / "saved")
    quantise(model, kind)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (tokenizer, settings.kind, loaded.config) == (None, kind, model.config)
    assert (loaded.output.weight is loaded.embedding.weight) == model.config.tie_embeddings


def test_a_run_can_be_quantised_while_it_is_loaded_or_exported(small_config, tmp_path, capsys):
    """Both give the same text; the folder has the tokenizer, and says in a line what it is."""
    run = whole_run(small_config)
    export(str(run), tmp_path / "saved", options=ExportOptions(quantize="int4"))
    assert "int4" in capsys.readouterr().out
    loaded, direct = moe_gpt.load(tmp_path / "saved"), moe_gpt.load(run, quantize="int4")
    assert loaded.generate("def ", 20, temperature=1) == direct.generate("def ", 20, temperature=1)
    assert loaded.context == direct.context == 64
    assert "fp32; int4 weights with bf16 activations" in loaded.setting
    assert repr(loaded).split("saved")[1:] == repr(moe_gpt.load(run)).split(direct.path.name)[1:]
    assert "Only moe_gpt reads this folder" in (tmp_path / "saved" / SETTINGS).read_text()
    with pytest.raises(InputError, match="quantize=int8: the weights are int4 already"):
        moe_gpt.load(tmp_path / "saved", quantize="int8")


def test_chat_templates_travel_from_a_hugging_face_folder(small_config, tmp_path):
    """Without them, a tuned model's chats would be rendered in another way."""
    moe_gpt.save(moe_gpt.load(whole_run(small_config)), tmp_path / "whole")
    (tmp_path / "whole/chat_template.jinja").write_text("{{ messages }}")
    export(str(tmp_path / "whole"), tmp_path / "saved", options=ExportOptions(quantize="int8"))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    loaded, direct = moe_gpt.load(tmp_path / "saved"), moe_gpt.load(tmp_path / "whole", quantize="int8")
    assert loaded.generate("The ", 20) == direct.generate("The ", 20)


def saved(tmp_path, kind: str = "int4"):
    """Return a folder that can be damaged."""
    model = tiny_model()
    quantised_folder.save(tmp_path / "saved", model, Settings(kind=kind, model=model.config), None, tmp_path)
    return tmp_path / "saved"


GATE_UP = "blocks.0.feed_forward.experts.gate_up"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("embedding.weight"), r"embedding.weight' must be torch.float32 \(61, 32\), got nothing"),
        (lambda t: t.update(more=torch.ones(3)), r"'more' must be nothing, got torch.float32 \(3,\)"),
        (
            lambda t: t.update({f"{GATE_UP}.numbers": torch.ones(2, 2)}),
            r"uint8 \(4, 32, 16\), got torch.float32",
        ),
        (lambda t: t[f"{GATE_UP}.scales"].fill_(torch.nan), rf"{GATE_UP}.scales has values that are not finite"),
    ],
    ids=["missing", "left over", "shape", "not finite"],
)
def test_wrong_tensors_are_named(change, text, tmp_path):
    """With what they must be, and what they are."""
    path = saved(tmp_path) / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(InputError, match=text):
        moe_gpt.load(path.parent)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "int2"}, "kind must be one of int8, int4, got 'int2'"),
        ({"format": "another"}, "format must be"),
        ({"extra": 1}, "extra"),
        ({"model": {"n_layers": 5000}}, "model.n_layers=5000"),
        ({"end_of_text": "<|endoftext|>"}, "tokenizer.json"),
    ],
)
def test_wrong_settings_are_named(settings, text, tmp_path):
    """In a line that names the file, the key and the value."""
    path = saved(tmp_path) / SETTINGS
    values = json.loads(path.read_text())
    if "model" in settings:
        settings = {"model": values["model"] | settings["model"]}
    path.write_text(json.dumps(values | settings))
    with pytest.raises((InputError, FileNotFoundError), match=text):
        moe_gpt.load(path.parent)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    """As everywhere."""
    path = saved(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"{WEIGHTS} cannot be read"):
        moe_gpt.load(path.parent)


def test_what_cannot_be_quantised_is_refused(tmp_path):
    """Other kinds, models that are quantised already, weights that are not finite, and exports of quantised models."""
    model = tiny_model()
    with pytest.raises(InputError, match="quantize must be int8 or int4, got 'int2'"):
        quantise(model, "int2")
    model.blocks[0].attention.qkv.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"blocks.0.attention.qkv.weight has values that are not finite"):
        quantise(model, "int8")
    model = tiny_model()
    quantise(model, "int8")
    for write in (
        lambda: quantise(model, "int4"),
        lambda: hugging_face.save(model, tmp_path / "a"),
        lambda: quantised_folder.save(tmp_path / "b", model, Settings(kind="int8", model=model.config), None, tmp_path),
    ):
        with pytest.raises(InputError, match="weights are int8 already"):
            write()
    assert not any(tmp_path.iterdir())
