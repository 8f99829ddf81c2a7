"""Encoders: rows of features from our own small one, and from any vision model in a folder."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file

from moe_gpt.errors import InputError
from moe_gpt.vision.encoders import FolderEncoder, Resampler, SmallEncoder, _load

SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 50, "max_position_embeddings": 8} | SIZE


def random_pictures(n: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """Pictures of noise."""
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_small_encoder_sees_what_is_where():
    """A row a square of eight pixels; a change in a corner moves the rows around it most; gradients reach all."""
    torch.manual_seed(0)
    encoder, pictures = SmallEncoder(), random_pictures(2)
    changed = pictures.clone()
    changed[:, :, 56:, 56:] = 255 - changed[:, :, 56:, 56:]
    features = encoder(pictures)
    assert features.shape == (2, 64, 96)
    moved = (encoder(changed) - features).norm(dim=2)
    assert moved.topk(4).indices.sort().values.tolist() == [[54, 55, 62, 63]] * 2
    features.square().sum().backward()
    assert all(parameter.grad.any() for parameter in encoder.parameters())
    assert not any(name == "positions" for name in encoder.state_dict())


def test_positions_differ():
    """Two equal squares of a picture give rows that differ."""
    rows = SmallEncoder()(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8))[0]
    assert torch.pdist(rows).min() > 1e-3


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "vit"])
def test_any_vision_model_in_a_folder_is_an_encoder(kind, tmp_path):
    """With its own processor, pictures of any size; models of pictures and text give their half for pictures."""
    torch.manual_seed(0)
    vision = SIZE | PICTURE
    if kind == "siglip":
        config = transformers.SiglipConfig(text_config=TEXT, vision_config=vision)
        model, processor = transformers.SiglipModel(config), transformers.SiglipImageProcessor
    elif kind == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)
        model, processor = transformers.CLIPModel(config), transformers.CLIPImageProcessor
    elif kind == "dinov2":
        config = transformers.Dinov2Config(**SIZE, **PICTURE)
        model, processor = transformers.Dinov2Model(config), transformers.BitImageProcessor
    else:
        model, processor = transformers.ViTModel(transformers.ViTConfig(**vision)), transformers.ViTImageProcessor
    model.save_pretrained(tmp_path)
    side = {"height": 32, "width": 32}
    crops = {"size": {"shortest_edge": 32}, "crop_size": side} if kind in ("clip", "dinov2") else {"size": side}
    processor(**crops).save_pretrained(tmp_path)
    encoder = FolderEncoder(tmp_path)
    assert encoder.width == 32
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features = encoder([random_pictures(1)[0], random_pictures(1, 40, 100)[0]])
    assert features.shape[::2] == (2, 32)
    assert features.shape[1] in (16, 17)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        images=[random_pictures(1)[0].permute(1, 2, 0).numpy()], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        right = getattr(model.eval(), "vision_model", model)(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(features[:1], right)


@pytest.mark.parametrize("processor", [transformers.BitImageProcessor, transformers.CLIPImageProcessor])
def test_the_border_of_a_square_picture_is_seen(processor, tmp_path):
    """Processors of DINOv2 and CLIP would make it larger, and crop it."""
    transformers.Dinov2Model(transformers.Dinov2Config(**SIZE, **PICTURE)).save_pretrained(tmp_path)
    processor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder, picture = FolderEncoder(tmp_path), random_pictures(1, 32, 32)
    assert encoder.side == 32
    changed = picture.clone()
    changed[:, :, 0] = 255 - changed[:, :, 0]
    assert not encoder([*picture])[0, 1:5].allclose(encoder([*changed])[0, 1:5], atol=1e-3)


def test_folders_that_see_nothing_are_refused(tmp_path):
    """Without a config, of a text model, of a kind that transformers does not know."""
    with pytest.raises(InputError, match="has no config.json"):
        FolderEncoder(tmp_path)
    config = transformers.LlamaConfig(num_key_value_heads=2, **TEXT)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\(model_type llama\)"):
        FolderEncoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(InputError, match=r"\(model_type nosuch\) is not loaded as a vision model"):
        FolderEncoder(tmp_path)


@pytest.mark.parametrize("kind", ["convnext", "resnet", "siglip2"])
def test_models_that_give_no_rows_are_refused(kind, tmp_path):
    """Grids of features, and models that want more than pixels."""
    if kind == "siglip2":
        vision = SIZE | {"patch_size": 8, "num_patches": 16}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))
        processor, cause = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), "pixels alone give no"
    else:
        sizes, processor = {"hidden_sizes": [8] * 4, "depths": [1] * 4}, transformers.ConvNextImageProcessor()
        cause = r"it gives features of shape \(1, 8, "
        if kind == "convnext":
            model = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes))
        else:
            model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, **sizes))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"\(model_type {kind}\S*\) is not loaded as a vision model: {cause}"):
        FolderEncoder(tmp_path)


def test_encoders_in_half_precision_and_without_a_pooler_give_float32(tmp_path):
    """A classifier has no pooler, and none is used; what is used must be there."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZE, **PICTURE)).half()
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert FolderEncoder(tmp_path)(random_pictures(1)).dtype == torch.float32
    tensors = {key: value for key, value in model.state_dict().items() if "layernorm" not in key}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _load.cache_clear()
    with pytest.raises(InputError, match="it lacks the tensors .*layernorm"):
        FolderEncoder(tmp_path)


def test_a_resampler_gives_a_fixed_number_of_rows():
    """Whatever came in, and in whatever order: it has no positions of its own."""
    torch.manual_seed(0)
    resampler = Resampler(32, n_rows=5).eval()
    features = torch.randn(2, 17, 32)
    rows = resampler(features)
    assert rows.shape == (2, 5, 32)
    assert resampler(features[:, :3]).shape == (2, 5, 32)
    torch.testing.assert_close(resampler(features.flip(1)), rows, atol=1e-5, rtol=1e-5)
    rows.sum().backward()
    assert resampler.queries.grad.any()
