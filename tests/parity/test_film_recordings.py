"""Recorded outputs of a checkpoint with FiLM, reproduced. These tests need `--golden DIR`.

test_oft.py compares its predictions.
"""

import pytest
import torch
from film_reference import PublishedTower
from oft_recordings import COMPONENTS, RecordedOFT, our_name
from test_oft import ACTIONS, GRADIENT, LOSS, error
from test_parity import in_published_layout

from openvla_hf.checkpoints.published_weights import FILM_LORA_RANK, published_film_backbone
from openvla_hf.modeling.parallel_decoding import ParallelPass, chunk_loss, lay_out


FEATURES, EMBEDDING = 5e-5, 1e-6
FIRST_ACTION_ID = 31744


@pytest.fixture(scope="module")
def record(golden):
    return RecordedOFT(golden / "oft-film")


@pytest.fixture(scope="module")
def published(record):
    (path,) = record.checkpoint.glob("vision_backbone--*")
    return torch.load(path, weights_only=True)


@torch.no_grad()
def test_image_features_of_every_prompt(record):
    model = record.model
    recorded = [k for k in range(len(record.predictions)) if f"film.{k}.projector_output" in record.tensors]
    assert len({record.predictions[k]["instruction"] for k in recorded}) == 4
    for k in recorded:
        inputs = record.inputs(k)
        ids, mask = lay_out(model.config, inputs["input_ids"], None, 1)
        parallel = ParallelPass(model, ids, inputs["pixel_values"], mask, torch.zeros(1, 8))
        expected = record.tensors[f"film.{k}.projector_output"]
        assert error(parallel.prefix[0, : len(expected)], expected) <= EMBEDDING
        if (expected := record.tensors.get(f"film.{k}.vision_features")) is not None:
            language = record.tensors[f"film.{k}.average_language_embedding"][None]
            features = model.model.vision_backbone(inputs["pixel_values"], language)[0]
            assert error(features, expected) <= FEATURES


@torch.no_grad()
def test_the_reference_of_the_tests_gives_the_recorded_features(record, published):
    for k in (0, 2, 8):
        pixels, language = record.inputs(k)["pixel_values"], record.tensors[f"film.{k}.average_language_embedding"]
        names = {"featurizer": 0, "fused_featurizer": 3}
        towers = zip(names.items(), record.model.config.vision_configs, strict=True)
        features = []
        for (name, channel), config in towers:
            tower = PublishedTower(published, f"vision_backbone.{name}.", config.num_attention_heads)
            images = [pixels[:, first + channel : first + channel + 3] for first in (0, 6)]
            features.append(torch.cat([tower(image, language[None], 2) for image in images], dim=1))
        assert error(torch.cat(features, dim=-1)[0], record.tensors[f"film.{k}.vision_features"]) <= FEATURES


def test_loss_and_gradients_with_the_padding_in_the_mean(record, published):
    """The original's mean includes the padding of the batch, so the test computes this mean itself."""
    model, batch, train = record.load(), record.batch, record.expected["train"]
    is_text = batch["labels"] < FIRST_ACTION_ID
    text = model.get_input_embeddings()(batch["input_ids"][is_text].reshape(3, -1))
    language = text.mean(1)
    assert error(language.detach(), record.tensors["train.average_language_embedding"]) <= EMBEDDING

    inputs = record.training_inputs()
    pixels, proprio = inputs["pixel_values"], inputs["proprio"]
    ids, mask = lay_out(model.config, inputs["input_ids"], inputs["attention_mask"], len(pixels))
    parallel = ParallelPass(model, ids, pixels, mask, proprio)
    parallel.prefix = model.model.get_prefix_features(pixels, proprio, language)
    outputs = chunk_loss(model, parallel, inputs["actions"])
    outputs.loss.backward()
    assert abs(outputs.loss.item() / train["loss"] - 1) <= LOSS
    assert error(outputs.actions.detach(), record.tensors["train.predicted_actions"]) <= ACTIONS
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    for name, norm in train["grad_norms"].items():
        gradient = published_gradient(name, gradients, published)
        assert abs(gradient.norm().item() / norm - 1) <= GRADIENT, name
        if (whole := record.tensors.get(f"grad.{name}")) is not None:
            assert error(gradient, whole) <= GRADIENT * whole.abs().max().item(), name
    assert all(one.grad is not None for name, one in model.named_parameters() if name != "lm_head.weight")


def published_gradient(name, gradients, published):
    """Return the gradient of a published weight. For parts of a LoRA, it follows from that of the merged weight."""
    if name.partition(".")[0] in COMPONENTS:
        return gradients[our_name(*name.split(".", 1))]
    layer, is_lora, side = name.partition(".lora_")
    if is_lora:
        down, up = (published[f"{layer}.lora_{one}.default.weight"].float() for one in "AB")
        merged = published_gradient(f"{layer}.weight", gradients, published).flatten(1)
        gradient = up.flatten(1).mT @ merged if side.startswith("A") else merged @ down.flatten(1).mT
        return gradient.reshape(published[name].shape)  # alpha / rank is 1
    name = name.replace(".block.", ".")
    return in_published_layout(
        name.replace(".scale.", ".film_scale.").replace(".shift.", ".film_shift."), gradients, True
    )


def test_an_exported_backbone_has_the_names_and_shapes_that_the_original_loads(record, published):
    exported = published_film_backbone(record.model)
    (rank,) = {len(tensor) for name, tensor in published.items() if ".lora_A." in name}
    assert exported.keys() == published.keys()
    for name, tensor in published.items():
        shape = list(tensor.shape)
        if ".lora_" in name:
            dim = int(".lora_B." in name)
            assert shape[dim] == rank
            shape[dim] = FILM_LORA_RANK
        assert list(exported[name].shape) == shape, name
