"""`convert` turns a vision-language model of Prismatic into a checkpoint that can be trained but can't act."""

import pytest
import torch
from model_parts import DINOV2_TIMM, SIGLIP_TIMM, write_dinov2, write_siglip, write_timm
from prismatic_runs import FUSED, as_trained, write_vlm
from transformers import AutoModel, AutoProcessor

from openvla_hf import OpenVLAForActionPrediction
from openvla_hf.checkpoints.convert import convert
from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.published_weights import published_state_dict
from openvla_hf.cli import main
from openvla_hf.testing import fake_episode


@pytest.fixture
def model(tiny, tmp_path):
    model, processor = tiny(norm_stats={})
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return model


@pytest.fixture
def parts(model):
    return as_trained(published_state_dict(model))


@pytest.fixture
def converted(model, tmp_path):
    """Return a function that converts a folder or a name: `converted("prism-dinosiglip-224px+7b")`."""
    config = model.config.to_dict()
    names = ("image_token_index", "prompt_suffix_token_id", "pad_token_id", "vision_config", "fused_vision_config")
    sizes = {name: config[name] for name in (*names, "text_config")}
    del sizes["text_config"]["rms_norm_eps"]

    def call(source, name="converted"):
        return convert(source, tmp_path / name, tokenizer=tmp_path / "tokenizer", dtype="float32", **sizes)

    return call


def test_a_model_with_trained_towers_keeps_all_of_its_weights(model, parts, converted, tmp_path):
    folder = converted(write_vlm(tmp_path / "vlm", parts))
    found, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    stored, expected = published_state_dict(found), published_state_dict(model)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    # As in the original's training, rather than as in published checkpoints of OpenVLA.
    assert found.config.text_config.rms_norm_eps == 1e-5
    assert processor.image_processor.image_mean == [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]
    assert describe(folder).action_dims == {}
    assert not (folder / "dataset_statistics.json").exists()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="pick up the red block")
    with pytest.raises(ValueError, match=r"no action statistics.* train it with `openvla-hf finetune`"):
        found.predict_action(**inputs)


def test_a_model_of_the_hub_gets_the_towers_that_its_file_leaves_out(
    owner, model, parts, converted, tmp_path, monkeypatch
):
    towers = write_dinov2(tmp_path / "dinov2"), write_siglip(tmp_path / "siglip", hidden_act="gelu")
    for tower, name in zip(towers, (f"{DINOV2_TIMM}.lvd142m", f"{SIGLIP_TIMM}.webli"), strict=True):
        write_timm(owner.root / "timm" / name, tower, name.partition(".")[0])
    del parts["vision_backbone"]
    write_vlm(owner.root / "TRI-ML/prismatic-vlms" / FUSED, parts)
    state = AutoModel.from_pretrained(converted(FUSED)).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor) != ("vision_backbone" in name), name
    name = "encoder.layer.1.mlp.fc1.weight"
    assert torch.equal(state[f"model.vision_backbone.featurizer.{name}"], towers[0].get_parameter(name))
    name = "embeddings.position_embedding.weight"
    assert torch.equal(state[f"model.vision_backbone.fused_featurizer.{name}"], towers[1].get_parameter(name))
    # The cache has all of these files.
    owner.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = AutoModel.from_pretrained(converted(FUSED, "again")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert owner.requests == []


def test_models_that_are_not_openvla_are_refused(parts, converted, tmp_path):
    for field, value in (
        ("vision_backbone_id", "clip-vit-l"),
        ("llm_backbone_id", "mistral-v0.1-7b-pure"),
        ("image_resize_strategy", "corner-pad"),
    ):
        vlm = write_vlm(tmp_path / field, parts, **{field: value})
        with pytest.raises(ValueError, match=rf"Unknown .* in config\.json of .*{field}: '{value}'"):
            converted(vlm)
    with pytest.raises(ValueError, match=r"'prism-dinosiglip-224px\+13b'\. Did you mean 'prism-dinosiglip-224px\+7b'"):
        converted("prism-dinosiglip-224px+13b")
    del parts["projector"]
    with pytest.raises(ValueError, match="has no weights of 'projector'"):
        converted(write_vlm(tmp_path / "incomplete", parts))


def test_a_model_must_be_converted_first(parts, tmp_path, capsys):
    vlm = write_vlm(tmp_path / "vlm", parts)
    with pytest.raises(ValueError, match="is a vision-language model of the original's code: convert it first"):
        OpenVLAForActionPrediction.from_pretrained(vlm)
    assert main(["convert", f"{tmp_path}/vlm", f"{tmp_path}/vlm"]) == 2
    assert "is not empty" in capsys.readouterr().err
