"""FiLM: the instruction modulates the vision towers."""

import pytest
import torch
from film_reference import PublishedTower

from openvla_hf.checkpoints.export import published_film_backbone
from openvla_hf.modeling.film import add_film, film_backbone_weights, mean_text_embedding, merge_lora
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config


def film_model(**kwargs):
    """A tiny model with FiLM."""
    config = tiny_config(**kwargs)
    model = OpenVLAForActionPrediction(config).eval()
    for tower in model.model.vision_backbone.towers:
        add_film(tower, config.text_config.hidden_size)
    return model


def randomize(published, rank, seed=0):
    """Random values for a published backbone whose LoRA has another rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for name, tensor in published.items():
        shape = list(tensor.shape)
        if ".lora_" in name:
            shape[".lora_B." in name] = rank
        shapes[name] = shape
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def features(backbone, pixel_values, language):
    """Features (B, P, D) of all towers."""
    pairs = zip(backbone.towers, pixel_values.split(3, dim=1), strict=True)
    tokens = [tower(pixel_values=pixels, language_embedding=language).last_hidden_state for tower, pixels in pairs]
    return torch.cat([one[:, -backbone.config.num_image_tokens :] for one in tokens], dim=-1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rank", [4, 16, 24])
def test_a_published_backbone_computes_what_its_unmerged_parts_compute(fused, rank):
    model = film_model(fused=fused)
    backbone, config = model.model.vision_backbone, model.config
    published = randomize(published_film_backbone(model), rank)
    backbone.load_state_dict(film_backbone_weights(backbone, published, "the file"))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    language = torch.randn(2, config.text_config.hidden_size, generator=generator)
    for (name, tower), tower_config in zip(backbone.named_children(), config.vision_configs, strict=True):
        reference = PublishedTower(published, f"vision_backbone.{name}.", tower_config.num_attention_heads)
        with torch.no_grad():
            features = tower(pixel_values=pixels, language_embedding=language).last_hidden_state
        expected = reference(pixels, language, config.vision_layers_built(tower_config))
        torch.testing.assert_close(features[:, -config.num_image_tokens :], expected, rtol=1e-5, atol=2e-5)


def test_an_exported_backbone_reads_back_unchanged():
    model = film_model()
    backbone = model.model.vision_backbone
    pixels, language = torch.randn(2, 6, 56, 56), torch.randn(2, model.config.text_config.hidden_size)
    with torch.no_grad():
        expected = features(backbone, pixels, language)
        backbone.load_state_dict(film_backbone_weights(backbone, published_film_backbone(model), "the file"))
        torch.testing.assert_close(features(backbone, pixels, language), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_scale_and_a_shift_of_zero_leave_a_tower_as_it_is(fused, attention):
    plain = OpenVLAForActionPrediction(tiny_config(fused=fused)).eval().model.vision_backbone
    film = film_model(fused=fused).model.vision_backbone
    assert not film.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    for backbone in (plain, film):
        for tower in backbone.towers:
            tower.set_attn_implementation(attention)
    pixels, language = torch.randn(2, 3 * len(film.towers), 56, 56), torch.randn(2, 64)
    with torch.no_grad():
        assert not features(film, pixels, language).equal(plain(pixels))
        for name, parameter in film.named_parameters():
            if ".film_" in name:
                parameter.zero_()
        assert features(film, pixels, language).equal(plain(pixels))


def test_gradients_reach_film_and_the_text_and_checkpointing_does_not_change_them():
    backbone = film_model().model.vision_backbone.train()
    pixels, gradients = torch.randn(2, 6, 56, 56), []
    language = torch.randn(2, 64, requires_grad=True)
    for checkpointing in (False, True):
        if checkpointing:
            backbone.activation_checkpointing_enable()
        features(backbone, pixels, language).square().mean().backward()
        gradients.append([one.grad for one in (language, *backbone.parameters())])
        assert all(gradient.any() for gradient in gradients[-1])
        backbone.zero_grad()
        language.grad = None
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_mean_of_the_text_is_that_of_each_row_alone():
    embeddings = torch.randn(2, 5, 8)
    is_text = torch.tensor([[False, True, True, False, True], [True, True, True, True, True]])
    mean = mean_text_embedding(embeddings, is_text)
    for row in range(2):
        torch.testing.assert_close(mean[row], embeddings[row, is_text[row]].mean(0))
    assert mean_text_embedding(embeddings.bfloat16(), is_text).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda file: file.pop("vision_backbone.featurizer.blocks.0.block.mlp.fc1.lora_B.default.weight"), "lacks"),
        (lambda file: file.pop("vision_backbone.featurizer.blocks.0.block.mlp.fc1.base_layer.weight"), "lacks"),
        (lambda file: file.pop("vision_backbone.featurizer.blocks.0.scale.bias"), "lacks .*film_scale.bias"),
        (lambda file: file.update({"vision_backbone.featurizer.blocks.0.gate": torch.ones(2)}), "unknown .*gate"),
        (lambda file: file.update({"projector.fc1.weight": torch.ones(2)}), "unknown .*projector"),
        (
            lambda file: file.update({"vision_backbone.featurizer.blocks.0.shift.bias": torch.ones(2)}),
            r"shape \(2,\) instead of \(32,\)",
        ),
        (
            lambda file: file.update(
                {"vision_backbone.featurizer.blocks.0.block.mlp.fc1.lora_A.default.weight": torch.ones(7, 32)}
            ),
            "do not fit",
        ),
    ],
)
def test_a_damaged_published_backbone_is_refused(damage, sentence):
    model = film_model()
    published = published_film_backbone(model)
    damage(published)
    with pytest.raises(ValueError, match=sentence):
        film_backbone_weights(model.model.vision_backbone, published, "the file")


def test_a_published_backbone_without_lora_is_read_too():
    model = film_model()
    published = published_film_backbone(model)
    plain = {name.replace(".base_layer.", "."): one for name, one in published.items() if ".lora_" not in name}
    for name, tensor in merge_lora(plain, "the file").items():
        assert tensor.equal(merge_lora(published, "the file")[name])
