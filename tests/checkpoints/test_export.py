"""`export` writes the published layout: the original's names, fields and bytes."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.export import PUBLISHED_CODE, export, published_config, published_image_processor
from openvla_hf.checkpoints.published_weights import published_state_dict
from openvla_hf.modeling import configuration_openvla
from openvla_hf.modeling.configuration_openvla import OFT_FIELDS, PUBLISHED_VISION_BACKBONES, OpenVLAConfig
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.processing.image_processing_openvla import OpenVLAImageProcessor
from openvla_hf.testing import fake_episode, write_oft_components


CASES = ["fused-224", "siglip-224", "sharded"]


def read_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def is_never_read(name, tensors):
    """Whether a published name belongs to the last block of a tower, its final norm or its pooling head."""
    tower, _, rest = name.removeprefix("vision_backbone.").partition(".")
    if not name.startswith("vision_backbone."):
        return False
    blocks = [key.split(".")[3] for key in tensors if key.startswith(f"vision_backbone.{tower}.blocks.")]
    return rest.startswith(("norm.", "attn_pool.", f"blocks.{max(map(int, blocks))}."))


@pytest.fixture
def tiny_towers(monkeypatch):
    """Let the published ids stand for the narrow towers of a recorded checkpoint, as when it was recorded."""

    def use(record):
        backbone_id = json.loads((record.checkpoint / "config.json").read_text())["vision_backbone_id"]
        names = ("vision_config", "fused_vision_config")
        towers = tuple(
            full and full | record.overrides[name]
            for name, full in zip(names, PUBLISHED_VISION_BACKBONES[backbone_id], strict=True)
        )
        monkeypatch.setitem(configuration_openvla.PUBLISHED_VISION_BACKBONES, backbone_id, towers)

    return use


@pytest.fixture
def exported(recorded, tiny_towers, tmp_path):
    """A recorded checkpoint, saved in our layout and exported from there."""

    def run(case, **kwargs):
        record = recorded(case)
        tiny_towers(record)
        record.load(dtype="auto").save_pretrained(tmp_path / "ours")
        record.processor.save_pretrained(tmp_path / "ours")
        return record, export(tmp_path / "ours", tmp_path / "published", **kwargs)

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_published_checkpoint_comes_back_byte_for_byte(exported, case):
    record, folder = exported(case)
    original, ours = read_tensors(record.checkpoint), read_tensors(folder)
    assert sorted(ours) == sorted(original)
    for name, tensor in original.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if is_never_read(name, original):
            assert set(ours[name].float().unique().tolist()) <= {0.0, 1.0}, name
        else:
            assert torch.equal(ours[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("case", CASES)
def test_configs_and_tokenizer_are_the_originals(exported, case):
    record, folder = exported(case)

    def both(name):
        return [json.loads((path / name).read_text()) for path in (folder, record.checkpoint)]

    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        ours, original = both(name)
        # The config names the repository that contains the code, so no copy of the code is needed.
        assert ours["auto_map"] == {key: PUBLISHED_CODE + value for key, value in original.pop("auto_map").items()}
        del ours["auto_map"]
        # Never read: the original applies `tvf_normalize_params`, and `legacy` differs between published repositories.
        for key in ("means", "stds", "legacy"):
            ours.pop(key, None), original.pop(key, None)
        assert ours == original, name
    for name in ("tokenizer.json", "generation_config.json", "dataset_statistics.json"):
        ours, original = both(name)
        assert ours == original, name


@torch.no_grad()
def test_exported_and_loaded_it_acts_the_same(exported, tmp_path, silent):
    record, folder = exported("fused-224", max_shard_size="8MB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    expected = record.load(dtype="auto")
    for kwargs in ({}, {"trust_remote_code": True}):
        model = AutoModel.from_pretrained(folder, dtype="auto", **kwargs)
        processor = AutoProcessor.from_pretrained(folder, **kwargs)
        inputs = processor(record.cases["prompts"][0], record.images[0])
        recorded_inputs = record.processor(record.cases["prompts"][0], record.images[0])
        assert torch.equal(inputs["input_ids"], recorded_inputs["input_ids"])
        assert torch.equal(inputs["pixel_values"], recorded_inputs["pixel_values"])
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
        assert model.norm_stats == expected.norm_stats
        assert processor.prompt_template == record.processor.prompt_template
    again = export(folder, tmp_path / "again", max_shard_size="8MB")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_the_class_position_that_training_made_goes_into_the_class_token(tiny):
    model, _ = tiny()
    tower = model.model.vision_backbone.featurizer
    positions = tower.embeddings.position_embeddings
    assert positions[:, 0].abs().min() > 0
    exported = published_state_dict(model)
    other, _ = tiny(seed=1)
    state = dict(other.model.vision_backbone.featurizer.state_dict())
    state["embeddings.cls_token"] = exported["vision_backbone.featurizer.cls_token"]
    for name, tensor in tower.state_dict().items():
        if name != "embeddings.cls_token":
            state[name] = tensor.clone()
    state["embeddings.position_embeddings"][:, 0] = 0  # as loading adds it
    other.model.vision_backbone.featurizer.load_state_dict(state)
    pixels = torch.randn(1, 3, 56, 56)
    features = [one.model.vision_backbone.featurizer(pixels).last_hidden_state for one in (model, other)]
    assert torch.equal(*features)


def test_a_block_that_was_never_read_passes_its_input_on(tiny):
    model, _ = tiny()
    exported = published_state_dict(model)
    for name in ("featurizer", "fused_featurizer"):
        tower = f"vision_backbone.{name}.blocks.2."
        added = {key.removeprefix(tower): value for key, value in exported.items() if key.startswith(tower)}
        assert {key for key in added if not added[key].any()} == {key for key in added if "norm" not in key} | {
            "norm1.bias",
            "norm2.bias",
        }
        assert all(added[f"norm{i}.weight"].eq(1).all() for i in (1, 2))


def test_full_size_has_the_published_tensors():
    config = OpenVLAConfig.from_dict(
        {"model_type": "openvla", "vision_backbone_id": "dinosiglip-vit-so-224px", "text_config": {}}
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config).bfloat16()
    tensors = published_state_dict(model)
    assert len(tensors) == 982
    assert sum(tensor.numel() for tensor in tensors.values()) == 7_541_237_184
    assert sum(tensor.nbytes for tensor in tensors.values()) == 15_082_474_368


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image_resize_strategy": "letterbox", "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"image_resize_strategy": "resize-crop", "size": 384},
    ],
)
def test_image_processors_come_back(fields):
    processor = OpenVLAImageProcessor(**fields)
    again = OpenVLAImageProcessor.from_dict(published_image_processor(processor))
    assert again.to_dict() == processor.to_dict()


def test_fields_that_only_the_evaluation_script_applies_give_a_warning(recorded, tiny_towers):
    record = recorded("fused-224")
    tiny_towers(record)
    processor = AutoProcessor.from_pretrained(record.checkpoint, resample="lanczos3", center_crop_area=0.9)
    with pytest.warns(UserWarning, match="The published layout does not store") as warned:
        published_config(record.load(), processor)
    assert [str(warning.message).split("`")[1] for warning in warned] == ["--center_crop True", "resample='lanczos3'"]
    assert published_image_processor(processor.image_processor)["interpolations"] == ["bicubic", "bicubic"]


def test_models_that_the_original_cannot_express_are_refused(tiny, tmp_path):
    model, processor = tiny(fused=False)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"`image_token_index` is .* can't be exported"):
        export(tmp_path / "ours", tmp_path / "published")
    config_file = tmp_path / "ours" / "config.json"
    config = json.loads(config_file.read_text())
    config |= {"image_token_index": 32001, "prompt_suffix_token_id": 29871}
    config["text_config"]["vocab_size"] = 32064
    AutoModel.from_config(OpenVLAConfig.from_dict(config)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"does not support these vision towers .*siglip-vit-so400m"):
        export(tmp_path / "ours", tmp_path / "published")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": False}
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": quantization}))
    assert describe(tmp_path / "ours").quantization == "bitsandbytes 8-bit"
    with pytest.raises(ValueError, match="quantised"):
        export(tmp_path / "ours", tmp_path / "published")
    assert not (tmp_path / "published").exists()
    with pytest.raises(FileExistsError, match="not empty"):
        export(tmp_path / "ours", tmp_path / "ours")


OFT_KINDS = {
    "l1": {},
    "aloha": {"platform": "aloha"},
    "diffusion": {"head": "diffusion"},
    "discrete": {"head": "none", "proprio": False},
    "film": {"film": True},
}


@pytest.fixture
def oft(recorded, tiny_towers, tmp_path):
    """A recorded checkpoint with components next to it, saved in our layout and exported from there."""
    record = recorded("fused-224")
    tiny_towers(record)

    def run(kind):
        source = shutil.copytree(record.checkpoint, tmp_path / "source")
        write_oft_components(source, record.model.config, **OFT_KINDS[kind])
        parallel = {"action_decoding": "parallel", "platform": "libero"} if kind == "discrete" else {}
        model = AutoModel.from_pretrained(source, **parallel)
        model.save_pretrained(tmp_path / "ours")
        AutoProcessor.from_pretrained(source, **parallel).save_pretrained(tmp_path / "ours")
        return source, model, export(tmp_path / "ours", tmp_path / "published")

    return run


@pytest.mark.parametrize("kind", OFT_KINDS)
def test_components_of_oft_come_back(oft, silent, kind):
    source, model, folder = oft(kind)
    files = {path.name for path in source.glob("*.pt")}
    assert {path.name for path in folder.glob("*.pt")} == files
    for name in files - {"vision_backbone--latest_checkpoint.pt"}:
        ours, original = (torch.load(path / name) for path in (folder, source))
        assert list(ours) == list(original)
        for key, tensor in original.items():
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor.bfloat16().to(tensor.dtype)), key
    assert json.loads((folder / "dataset_statistics.json").read_text()) == model.norm_stats
    again = AutoModel.from_pretrained(folder)
    assert {name: getattr(again.config, name) for name in OFT_FIELDS} == {
        name: getattr(model.config, name) for name in OFT_FIELDS
    }
    for name, tensor in model.state_dict().items():
        if not name.endswith(("cls_token", "position_embeddings")):  # the layout adds one to the other
            assert torch.equal(again.state_dict()[name], tensor), name
    if kind in ("l1", "discrete"):  # the others read the same weights
        options = {"platform": "libero"} if kind == "discrete" else {}
        processor = AutoProcessor.from_pretrained(folder, **options)
        frames = [frame["image"] for frame in fake_episode(steps=len(processor.cameras))]
        state = {"state": [0.1] * processor.state_dim} if processor.state_dim else {}
        inputs = processor(frames if len(frames) > 1 else frames[0], instruction="open the drawer", **state)
        assert np.array_equal(again.predict_action(**inputs), model.predict_action(**inputs))


def test_a_plain_policy_with_several_images_is_not_exported(recorded, tiny_towers):
    record = recorded("fused-224")
    tiny_towers(record)
    with pytest.raises(ValueError, match="several images or a state only with parallel decoding"):
        published_config(record.load(num_images=2), record.processor)


def test_image_processing_and_cameras_that_oft_does_not_store_give_a_warning(oft, tmp_path):
    oft("l1")
    for path in (tmp_path / "published").iterdir():
        path.unlink()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", cameras=["front", "wrist"], center_crop_area=None)
    processor.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="The published layout does not store") as warned:
        export(tmp_path / "ours", tmp_path / "published")
    sentences = [str(warning.message) for warning in warned]
    assert "`center_crop_area=None`" in sentences[0]
    assert "the names of the cameras (front, wrist)" in sentences[1]
