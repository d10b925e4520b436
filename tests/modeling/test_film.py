"""FiLM: the instruction modulates the vision towers."""

import pytest
import torch
from film_reference import PublishedTower, needs_export
from transformers import AutoModel, ViTConfig

from openvla_hf.checkpoints.published_weights import published_film_backbone
from openvla_hf.modeling.film import film_backbone_weights, mean_text_embedding, merge_lora
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.modeling.vision_towers import build_tower
from openvla_hf.testing import tiny_config, write_tiny_oft


def film_model(**kwargs):
    """A tiny model with FiLM and two images."""
    fields = {"use_film": True, "num_images": 2, "action_decoding": "parallel", "action_head": "l1", "action_dim": 7}
    return OpenVLAForActionPrediction(tiny_config(**fields | kwargs)).eval()


def randomize(published, rank, seed=0):
    """Make random weights for a published backbone whose LoRA has another rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for name, tensor in published.items():
        shape = list(tensor.shape)
        if ".lora_" in name:
            shape[".lora_B." in name] = rank
        shapes[name] = shape
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def expected_features(published, config, pixel_values, language):
    """Compute the features of the images directly from the published file."""
    images = pixel_values.unflatten(1, (config.num_images, -1, 3))
    towers = []
    for index, (name, tower) in enumerate(
        zip(("featurizer", "fused_featurizer"), config.vision_configs, strict=False)
    ):
        reference = PublishedTower(published, f"vision_backbone.{name}.", tower.num_attention_heads)
        blocks = config.vision_layers_built(tower)
        features = [reference(images[:, image, index], language, blocks) for image in range(config.num_images)]
        towers.append(torch.cat(features, dim=1))
    return torch.cat(towers, dim=-1)


@torch.no_grad()
@needs_export
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rank", [4, 16, 24])
def test_a_published_backbone_computes_what_its_unmerged_parts_compute(fused, rank):
    model = film_model(fused=fused)
    backbone = model.model.vision_backbone
    published = randomize(published_film_backbone(model), rank)
    backbone.load_state_dict(film_backbone_weights(backbone, published, "the file"))
    pixels, language = torch.randn(2, 6 * len(backbone.towers), 56, 56), torch.randn(2, 64)
    expected = expected_features(published, model.config, pixels, language)
    torch.testing.assert_close(backbone(pixels, language), expected, rtol=1e-5, atol=3e-5)


@torch.no_grad()
@needs_export
@pytest.mark.parametrize("head", ["l1", "none"])
def test_the_backbone_beside_a_published_checkpoint_replaces_that_of_the_main_file(tmp_path, head):
    folder = write_tiny_oft(tmp_path / "published", head=head)
    published = randomize(published_film_backbone(film_model()), rank=8)
    torch.save(published, folder / "vision_backbone--latest_checkpoint.pt")
    model = AutoModel.from_pretrained(folder, platform="libero")
    assert model.config.use_film
    pixels, language = torch.randn(2, 12, 56, 56), torch.randn(2, 64)
    expected = expected_features(published, model.config, pixels, language)
    torch.testing.assert_close(model.model.vision_backbone(pixels, language), expected, rtol=1e-5, atol=3e-5)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again.model.vision_backbone(pixels, language), expected, rtol=1e-5, atol=3e-5)


@needs_export
def test_an_exported_backbone_reads_back_unchanged():
    model = film_model()
    backbone = model.model.vision_backbone
    pixels, language = torch.randn(2, 12, 56, 56), torch.randn(2, model.config.text_config.hidden_size)
    with torch.no_grad():
        expected = backbone(pixels, language)
        backbone.load_state_dict(film_backbone_weights(backbone, published_film_backbone(model), "the file"))
        torch.testing.assert_close(backbone(pixels, language), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_scale_and_a_shift_of_zero_leave_a_tower_as_it_is(fused, attention):
    plain = film_model(fused=fused, use_film=False).model.vision_backbone
    film = film_model(fused=fused).model.vision_backbone
    assert not film.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    for backbone in (plain, film):
        for tower in backbone.towers:
            tower.set_attn_implementation(attention)
    pixels, language = torch.randn(2, 6 * len(film.towers), 56, 56), torch.randn(2, 64)
    with torch.no_grad():
        assert not film(pixels, language).equal(plain(pixels))
        for name, parameter in film.named_parameters():
            if ".film_" in name:
                parameter.zero_()
        assert film(pixels, language).equal(plain(pixels))


def test_gradients_reach_film_and_the_text_and_checkpointing_does_not_change_them():
    backbone = film_model().model.vision_backbone.train()
    pixels, gradients = torch.randn(2, 12, 56, 56), []
    language = torch.randn(2, 64, requires_grad=True)
    for checkpointing in (False, True):
        if checkpointing:
            backbone.gradient_checkpointing_enable()
        backbone(pixels, language).square().mean().backward()
        gradients.append([one.grad for one in (language, *backbone.parameters())])
        assert all(gradient.any() for gradient in gradients[-1])
        backbone.zero_grad()
        language.grad = None
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_text_embedding_that_does_not_fit_is_refused():
    film, plain = (film_model(use_film=use_film).model.vision_backbone for use_film in (True, False))
    pixels = torch.randn(2, 12, 56, 56)
    with pytest.raises(ValueError, match="`language_embedding` is missing"):
        film(pixels)
    with pytest.raises(ValueError, match=r"has shape \(1, 64\)"):
        film(pixels, torch.randn(1, 64))
    with pytest.raises(ValueError, match="no FiLM"):
        plain(pixels, torch.randn(2, 64))


def test_film_of_other_towers_or_of_autoregressive_decoding_is_refused():
    tower = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match="'vit'"):
        build_tower(tower, film_width=8)
    with pytest.raises(ValueError, match="needs `action_decoding='parallel'`"):
        tiny_config(use_film=True)


def test_the_mean_of_the_text_is_that_of_each_row_alone():
    embeddings = torch.randn(2, 5, 8)
    is_text = torch.tensor([[False, True, True, False, True], [True, True, True, True, True]])
    mean = mean_text_embedding(embeddings, is_text)
    for row in range(2):
        torch.testing.assert_close(mean[row], embeddings[row, is_text[row]].mean(0))
    assert mean_text_embedding(embeddings.bfloat16(), is_text).dtype == torch.bfloat16


BLOCK = "vision_backbone.featurizer.blocks.0"
FC1 = f"{BLOCK}.block.mlp.fc1"


@needs_export
@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        (f"{FC1}.lora_B.default.weight", None, "lacks"),
        (f"{FC1}.base_layer.weight", None, "lacks"),
        (f"{BLOCK}.scale.bias", None, "lacks .*film_scale.bias"),
        (f"{BLOCK}.gate", torch.ones(2), "unknown .*gate"),
        ("projector.fc1.weight", torch.ones(2), "unknown .*projector"),
        (f"{BLOCK}.shift.bias", torch.ones(2), r"shape \(2,\) instead of \(32,\)"),
        (f"{FC1}.lora_A.default.weight", torch.ones(7, 32), "do not fit"),
        (f"{FC1}.lora_A.default.weight", torch.ones(32), "do not fit"),
        (f"{FC1}.base_layer.weight", torch.tensor(1.0), "do not fit"),
        (f"{BLOCK}.block.attn.qkv.base_layer.bias", torch.tensor(1.0), "wrong number of dimensions"),
        ("vision_backbone.featurizer.pos_embed", torch.ones(5), "wrong number of dimensions"),
    ],
)
def test_a_damaged_published_backbone_is_refused(name, tensor, sentence):
    model = film_model()
    published = {key: one for key, one in published_film_backbone(model).items() if key != name}
    if tensor is not None:
        published[name] = tensor
    with pytest.raises(ValueError, match=sentence):
        film_backbone_weights(model.model.vision_backbone, published, "the file")


@needs_export
def test_a_published_backbone_without_lora_is_read_too():
    model = film_model()
    published = published_film_backbone(model)
    plain = {name.replace(".base_layer.", "."): one for name, one in published.items() if ".lora_" not in name}
    for name, tensor in merge_lora(plain, "the file").items():
        assert tensor.equal(merge_lora(published, "the file")[name])
